//! The fast CPU backend, and the promise that its speed costs no bit.
//!
//! [`Cpu`] runs the ops of [`apr_model::Backend`] on weights as their file stores them. The value of an output element
//! depends on its inputs only: never on threads, on how many rows are computed together, on the instruction set or
//! on who looks. To that end every sum has one order, which is part of its kernel's contract:
//!
//! - quantised weights: integers within a block, one chain of fused multiply-adds over blocks (`generic::tile`);
//! - float weights, norms: 16 lanes, then a tree (`generic::float`, `generic::norm`);
//! - attention: a chain over channels for a score, over positions for a result (`generic::attention`);
//! - exponentials: our own polynomial (`generic::exp`).
//!
//! Read `generic/` for the algorithms; `x86_64/` and `aarch64/` hold what compilers do badly. [`Isa`] picks a table of
//! kernels once; on both machines every stored type has vector code. The crate refuses to approximate silently: types that it does not multiply are an error on load.
//!
//! Activations are multiplied with quantised weights after rounding to 8 bits, as llama.cpp does
//! ([`apr_tensor::activation`]; minima are multiplied with exact sums, so there is no Q8_1), and with float weights as
//! they are. [`Activations::F32`] never rounds them.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod activation;
mod attention;
mod backend;
mod error;
mod generic;
mod isa;
mod kernels;
mod kv;
mod linear;
mod memory;
mod pages;
mod pool;
mod probe;
mod routing;
mod tensor;
mod tile;
mod weight;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::thread;

use apr_tensor::DType;

pub use error::{Error, Result};
pub use isa::{Isa, UnknownIsa};
pub use kv::Kv;
pub use probe::{Peaks, Reader, probe};
pub use tensor::Tensor;
pub use weight::Weight;

use kernels::Kernels;
use memory::Memory;
use pages::Pages;
use pool::Pool;

/// How a [`Cpu`] is to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads, the caller's included; `None` for as many as the machine runs at once. Changes no bit.
    pub threads: Option<usize>,
    /// The instruction set; `None` for the best that the machine has. Changes no bit.
    pub isa: Option<Isa>,
    /// What activations are multiplied as.
    pub activations: Activations,
    /// The type of cached keys and values.
    pub kv: KvType,
    /// Leaves quantised weights in the order of their file: they take no memory of ours, and are reordered each time that
    /// they are multiplied. Changes no bit.
    pub no_repack: bool,
}

/// What activations are rounded to before they are multiplied with quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// To 8 bits, in the blocks that the weight's type asks for: fast.
    #[default]
    Native,
    /// Not at all: weights are dequantised instead. For comparisons; slow.
    F32,
}

/// The type of cached keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the types name themselves")]
pub enum KvType {
    #[default]
    F16,
    F32,
}

impl KvType {
    /// The bytes of an element.
    fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// As a stored type.
    pub fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
        }
    }
}

/// The backend: a table of kernels, a pool of threads, and memory that is used again.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    kernels: &'static Kernels,
    pool: Pool,
    memory: Memory,
    /// Where reordered weights lie.
    pages: Pages,
    activations: Activations,
    kv: KvType,
    /// Whether quantised weights are reordered once, on load.
    repack: bool,
}

impl Cpu {
    /// A backend; starts its threads.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let CpuOptions { threads, isa, activations, kv, no_repack } = options;
        let isa = isa.unwrap_or_else(Isa::best);
        let threads =
            threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, Into::into));
        let (kernels, repack) = (isa.kernels()?, !no_repack);
        let (pool, memory, pages) = (Pool::new(threads)?, Memory::new(), Pages::default());
        Ok(Self { isa, kernels, pool, memory, pages, activations, kv, repack })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}
