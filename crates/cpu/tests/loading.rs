//! What loading says while it goes on, and what a cache takes.

use std::{collections::BTreeSet, ops::ControlFlow, ptr};

use apr_cpu::{Cpu, CpuOptions, KvType, Weight};
use apr_format::Checkpoint;
use apr_model::{Backend, Error, KvShape, LayerKv, Loaded, Model};
use apr_testkit::{fixture, invariants::tiny_files};

fn cpu() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap()
}

#[test]
fn loading_tells_of_every_byte_of_the_tensors() {
    for file in tiny_files() {
        let checkpoint = Checkpoint::open(fixture(&file)).unwrap();
        let size = |of: &dyn Fn(&str) -> bool| -> u64 {
            let tensors = checkpoint.tensors().filter(|(name, _)| of(name));
            tensors.map(|(_, stored)| stored.bytes().len() as u64).sum()
        };
        let mut told: Vec<Loaded> = Vec::new();
        let mut watch = |loaded| {
            told.push(loaded);
            ControlFlow::Continue(())
        };
        Model::load_watched(cpu(), &checkpoint, &mut watch).unwrap();
        assert!(told.is_sorted_by(|a, b| a.bytes < b.bytes && a.total == b.total), "{file}");
        let all =
            Loaded { bytes: size(&|name| name != "rope_freqs.weight"), total: size(&|_| true) };
        assert_eq!(told.last(), Some(&all), "{file}");
    }
}

#[test]
fn whoever_watches_may_stop_the_loading() {
    let checkpoint = Checkpoint::open(fixture("tiny/llama")).unwrap();
    let mut calls = 0;
    let stopped = Model::load_watched(cpu(), &checkpoint, &mut |_| {
        calls += 1;
        ControlFlow::Break(())
    });
    assert!(matches!(stopped.err(), Some(Error::LoadingStopped)) && calls == 1);
}

#[test]
fn a_cache_for_which_there_is_no_memory_is_refused() {
    let shape = KvShape { heads: 8, head_dim: 128 };
    for positions in [1 << 50, usize::MAX] {
        let error = cpu().kv(shape, positions).expect_err("no machine has this much");
        assert!(matches!(error, Error::CacheMemory { .. }), "{error}");
        assert!(error.to_string().contains("ask for fewer tokens"), "{error}");
    }
}

#[test]
fn a_cache_knows_its_size() {
    let shape = KvShape { heads: 3, head_dim: 16 };
    for (kv, bytes) in [(KvType::F16, 2), (KvType::F32, 4)] {
        let cpu = Cpu::new(CpuOptions { kv, threads: Some(1), ..CpuOptions::default() }).unwrap();
        // Keys are kept in blocks of 16 positions.
        assert_eq!(cpu.kv(shape, 100).unwrap().bytes(), 2 * 3 * 16 * 112 * bytes);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn positions_that_nobody_has_seen_take_no_memory() {
    /// Of this process, in pages.
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse().unwrap()
    }
    let before = resident();
    let cache = cpu().kv(KvShape { heads: 8, head_dim: 128 }, 1 << 18).unwrap();
    let grown = resident().saturating_sub(before) * 4096;
    assert!(cache.bytes() == 1 << 30 && grown < 1 << 28, "{grown} of {}", cache.bytes());
}

#[test]
fn a_models_matrices_are_those_that_its_sites_read() {
    for file in tiny_files() {
        let model = Model::load(cpu(), &Checkpoint::open(fixture(&file)).unwrap()).unwrap();
        let all: Vec<*const Weight> = model.weights().map(ptr::from_ref).collect();
        let of_sites = model.plan().sites().iter().filter_map(|&site| model.weight(site));
        let read: BTreeSet<*const Weight> = of_sites.map(ptr::from_ref).collect();
        assert_eq!(all.iter().copied().collect::<BTreeSet<_>>(), read, "{file}");
        assert_eq!(all.len(), read.len(), "{file}: each once");
    }
}
