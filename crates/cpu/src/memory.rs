//! Memory that is used again.
//!
//! Each decode step asks for the same few hundred buffers as the last one did. So a [`Buffer`] goes back to where it came from
//! when it is dropped, and once the first steps are done nothing is allocated any more.

use std::{
    ops::{Deref, DerefMut},
    ptr::without_provenance,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

#[cfg(target_arch = "aarch64")]
pub(crate) use crate::aarch64::{fetched_for_one, prefetch, prefetch_early};
#[cfg(target_arch = "x86_64")]
pub(crate) use crate::x86_64::{fetched_for_one, prefetch, prefetch_early};

use crate::{
    activation::{Floats, MATRIX, Q8, Q8K, Q8KMatrix, Q8Matrix, Sums, TOGETHER},
    generic::LANES,
};

/// The most bytes that one store keeps for later: about what reading a long prompt in chunks of 512 tokens takes.
const MOST_KEPT: usize = 256 << 20;

/// Bytes from what is in use to what memory is asked for, where each is read once.
const FETCH_AHEAD: usize = 8 << 10;

/// The same where the second-level cache is asked to have them first, and then the first-level one.
const FETCH_EARLY: usize = 32 << 10;
const FETCH_SOON: usize = 4 << 10;

/// Bytes that a cache takes at a time.
const LINE: usize = 64;

/// The memory of which lines are asked for in turn: those of four pages.
const FETCH_TURNS: usize = 16 << 10;

/// How weights are asked for before they are used.
#[derive(Clone, Copy)]
pub(crate) enum Fetch {
    /// Not at all: they have been read before, or come in time on their own.
    No,
    AtOnce,
    /// First into the second-level cache, then into the first one.
    InSteps,
    /// Lines of four pages in turn: a core that reads ahead on its own does so in each page apart, and starts anew with the next.
    InPages,
}

/// Asks for the line that is read some time after that of `address`, where all are read in the order of memory.
#[inline(always)]
pub(crate) fn fetch_after<T>(address: *const T, fetch: Fetch) {
    match fetch {
        Fetch::No => {}
        Fetch::AtOnce => prefetch(address.wrapping_byte_add(FETCH_AHEAD)),
        Fetch::InSteps => {
            prefetch_early(address.wrapping_byte_add(FETCH_EARLY));
            prefetch(address.wrapping_byte_add(FETCH_SOON));
        }
        // It is not read from here.
        Fetch::InPages => prefetch(without_provenance::<T>(in_pages(address.addr()))),
    }
}

/// Asks for share `i` of `shares` of what comes after `lines`. A core that is asked for too much at a time has none of it in time.
#[inline(always)]
pub(crate) fn fetch_share<T>(lines: &[T], i: usize, shares: usize, fetch: Fetch) {
    for line in lines.len() * i / shares..lines.len() * (i + 1) / shares {
        fetch_after(lines.as_ptr().wrapping_add(line), fetch);
    }
}

/// The address to ask for when the line at `address` is used, so that each line of the next four pages is asked for once: of 256 lines number `4i + p` asks for
/// line `i` of page `p`.
#[inline(always)]
fn in_pages(address: usize) -> usize {
    // The lines of four pages are as many as a byte has values.
    let line = (address / LINE) as u8;
    (address / FETCH_TURNS + 1) * FETCH_TURNS + usize::from(line.rotate_right(2)) * LINE
}

/// Other machines fetch memory on their own.
#[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
mod elsewhere {
    #[inline(always)]
    pub(crate) fn fetched_for_one(_: bool) -> super::Fetch {
        super::Fetch::No
    }

    #[inline(always)]
    pub(crate) fn prefetch_early<T>(_: *const T) {}

    #[inline(always)]
    pub(crate) fn prefetch<T>(_: *const T) {}
}
#[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
pub(crate) use elsewhere::{fetched_for_one, prefetch, prefetch_early};

/// What buffers are made of.
pub(crate) trait Plain: Copy + Send {
    /// What memory holds that nobody has written. Debug builds take care that it does: it shows in a test, then.
    const UNWRITTEN: Self;

    /// Where buffers of this type come from.
    fn store(memory: &Memory) -> &Arc<Store<Self>>;
}

impl Plain for f32 {
    const UNWRITTEN: Self = f32::NAN;

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.floats
    }
}

impl Plain for usize {
    const UNWRITTEN: Self = usize::MAX;

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.indices
    }
}

impl<const N: usize> Q8<N> {
    const UNKNOWN: Self = Self { d: [f32::NAN; N], sum: [0; N], qs: [[[0; 4]; N]; 8] };
}

impl Plain for Q8 {
    const UNWRITTEN: Self = Self::UNKNOWN;

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.q8_0
    }
}

impl Plain for Q8<TOGETHER> {
    const UNWRITTEN: Self = Self::UNKNOWN;

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.q8_0_packed
    }
}

impl Plain for Q8Matrix {
    const UNWRITTEN: Self = Self { qs: [[0; 32]; MATRIX], d: [f32::NAN; MATRIX], sum: [0; MATRIX] };

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.q8_0_matrices
    }
}

impl<const N: usize> Sums<N> {
    const UNKNOWN: Self = Self { of_16: [[[0; 2]; N]; 8], of_32: [[[0; 2]; N]; 4] };
}

impl<const N: usize> Q8K<N> {
    const UNKNOWN: Self = Self { d: [f32::NAN; N], sums: Sums::UNKNOWN, qs: [[[0; 4]; N]; 64] };
}

impl Plain for Q8K {
    const UNWRITTEN: Self = Self::UNKNOWN;

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.q8_k
    }
}

impl Plain for Q8K<TOGETHER> {
    const UNWRITTEN: Self = Self::UNKNOWN;

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.q8_k_packed
    }
}

impl Plain for Q8KMatrix {
    const UNWRITTEN: Self =
        Self { qs: [[0; 256]; MATRIX], d: [f32::NAN; MATRIX], sums: Sums::UNKNOWN };

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.q8_k_matrices
    }
}

impl Plain for Floats {
    const UNWRITTEN: Self = Self([f32::NAN; LANES]);

    fn store(memory: &Memory) -> &Arc<Store<Self>> {
        &memory.packed
    }
}

/// A backend's memory for what it computes.
#[derive(Debug)]
pub(crate) struct Memory {
    floats: Arc<Store<f32>>,
    packed: Arc<Store<Floats>>,
    indices: Arc<Store<usize>>,
    q8_0: Arc<Store<Q8>>,
    q8_k: Arc<Store<Q8K>>,
    q8_0_packed: Arc<Store<Q8<TOGETHER>>>,
    q8_k_packed: Arc<Store<Q8K<TOGETHER>>>,
    q8_0_matrices: Arc<Store<Q8Matrix>>,
    q8_k_matrices: Arc<Store<Q8KMatrix>>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self {
            floats: Store::new(MOST_KEPT),
            packed: Store::new(MOST_KEPT),
            indices: Store::new(MOST_KEPT),
            q8_0: Store::new(MOST_KEPT),
            q8_k: Store::new(MOST_KEPT),
            q8_0_packed: Store::new(MOST_KEPT),
            q8_k_packed: Store::new(MOST_KEPT),
            q8_0_matrices: Store::new(MOST_KEPT),
            q8_k_matrices: Store::new(MOST_KEPT),
        }
    }

    /// A buffer that holds anything: whoever asks for it writes all of it.
    pub(crate) fn buffer<T: Plain>(&self, len: usize) -> Buffer<T> {
        T::store(self).take(len)
    }
}

/// Memory of one type, given out and taken back.
#[derive(Debug)]
pub(crate) struct Store<T> {
    free: Mutex<Free<T>>,
    /// The most bytes that are kept for later.
    most: usize,
}

/// What has come back, by the power of two that its capacity reaches.
#[derive(Debug)]
struct Free<T> {
    by_class: [Vec<Vec<T>>; usize::BITS as usize],
    bytes: usize,
}

impl<T: Plain> Store<T> {
    fn new(most: usize) -> Arc<Self> {
        let free = Free { by_class: [const { Vec::new() }; _], bytes: 0 };
        Arc::new(Self { free: Mutex::new(free), most })
    }

    fn free(&self) -> MutexGuard<'_, Free<T>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, len: usize) -> Buffer<T> {
        let capacity = len.max(1).next_power_of_two();
        let kept = self.free().take(capacity);
        let mut values = kept.unwrap_or_else(|| Vec::with_capacity(capacity));
        if cfg!(debug_assertions) {
            values.clear();
        }
        values.resize(len, T::UNWRITTEN);
        Buffer { values, home: Some(self.clone()) }
    }

    fn give(&self, values: Vec<T>) {
        self.free().give(values, self.most);
    }
}

impl<T> Free<T> {
    fn take(&mut self, capacity: usize) -> Option<Vec<T>> {
        let values = self.by_class[capacity.ilog2() as usize].pop()?;
        self.bytes -= values.capacity() * size_of::<T>();
        Some(values)
    }

    /// Keeps `values`, if need be in place of larger ones: those are of a prompt, and more may follow of a step.
    fn give(&mut self, values: Vec<T>, most: usize) {
        let Some(class) = values.capacity().checked_ilog2() else { return };
        let class = class as usize;
        let bytes = values.capacity() * size_of::<T>();
        while self.bytes + bytes > most {
            let Some(larger) = self.by_class[class + 1..].iter_mut().rev().find_map(Vec::pop)
            else {
                return;
            };
            self.bytes -= larger.capacity() * size_of::<T>();
        }
        self.bytes += bytes;
        self.by_class[class].push(values);
    }
}

/// Some memory; it goes back where it came from when it is dropped.
#[derive(Debug)]
pub(crate) struct Buffer<T: Plain> {
    values: Vec<T>,
    /// `None` for memory from elsewhere.
    home: Option<Arc<Store<T>>>,
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            home.give(std::mem::take(&mut self.values));
        }
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values
    }
}

impl<T: Plain> From<Vec<T>> for Buffer<T> {
    fn from(values: Vec<T>) -> Self {
        Self { values, home: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(memory: &Memory, len: usize) -> Buffer<f32> {
        memory.buffer(len)
    }

    #[test]
    fn memory_comes_back_and_is_given_out_again() {
        let memory = Memory::new();
        let first = floats(&memory, 1000);
        let place = first.as_ptr();
        drop(first);
        let (again, other) = (floats(&memory, 900), floats(&memory, 1000));
        assert_eq!((again.len(), again.as_ptr()), (900, place));
        assert_ne!(other.as_ptr(), place, "one buffer is in one hand");
        drop(again);
        assert_ne!(floats(&memory, 100).as_ptr(), place, "little is not taken from much");
        assert_eq!(floats(&memory, 1024).as_ptr(), place);
    }

    #[test]
    fn what_nobody_wrote_shows_in_debug_builds() {
        let memory = Memory::new();
        floats(&memory, 8).fill(1.0);
        let again = floats(&memory, 7);
        assert!(!cfg!(debug_assertions) || again.iter().all(|x| x.is_nan()));
    }

    #[test]
    fn no_more_is_kept_than_the_limit_and_small_buffers_rather_than_large_ones() {
        let store: Arc<Store<f32>> = Store::new(8 * size_of::<f32>());
        let kept = || store.free().bytes / size_of::<f32>();
        let [small, a, b] = [1, 4, 4].map(|len| store.take(len));
        drop((a, b));
        assert_eq!(kept(), 8);
        drop(small);
        assert_eq!(kept(), 5, "one large buffer has made room");
        drop(store.take(16));
        assert_eq!(kept(), 5);
    }

    #[test]
    fn lines_of_four_pages_are_asked_for_in_turn_and_each_once() {
        let asked: Vec<usize> = (0..256).map(|i| in_pages(5 * FETCH_TURNS + i * LINE)).collect();
        let page = |address: &usize| address / 4096 - 6 * 4;
        assert!(asked.iter().map(page).eq((0..256).map(|i| i % 4)));
        let mut lines = asked.clone();
        lines.sort_unstable();
        assert!(lines.into_iter().eq((0..256).map(|i| 6 * FETCH_TURNS + i * LINE)));
        // A page's worth of lines, at least, lies between what is in use and what is asked for.
        assert!(asked.iter().zip(0..).all(|(a, i)| a - (5 * FETCH_TURNS + i * LINE) >= 4096));
    }

    #[test]
    fn memory_outlives_its_backend() {
        let memory = Memory::new();
        let mut buffer = floats(&memory, 3);
        drop(memory);
        buffer.fill(1.0);
        assert_eq!(*buffer, [1.0; 3]);
    }
}
