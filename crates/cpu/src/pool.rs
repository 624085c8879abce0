//! Threads that share one job after the other.
//!
//! A decode step has hundreds of jobs of a few microseconds, so what counts is how fast a job starts and ends.
//! A job is cut into chunks beforehand; the threads, the caller among them, claim one after the other. So the
//! caller never waits for a worker that has not woken up yet, only for chunks that are being computed. Workers spin
//! for a bounded time when there is nothing to do, then park.
//!
//! Where other programs want the cores too, a worker may be taken off its core in the middle of a chunk, and what the others
//! have done in the meantime has to wait for it. The caller notices, and goes on [alone](Company) for a while: one thread
//! that is never waited for gets more done than two that wait for each other.
//!
//! Which thread computes a chunk is left to chance, so a chunk's result must not depend on it, nor on where the
//! chunks are cut. Jobs do not nest: a job that starts another one panics.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    fmt, hint,
    marker::PhantomData,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{Error, Result};

/// The most threads that a pool accepts.
const MAX_THREADS: usize = 1024;

/// Turns of the loop in which an idle worker looks for a job before it parks: some tens of microseconds.
const IDLE_SPINS: u32 = 1000;

/// Chunks per thread: more than one evens out threads that are interrupted.
const CHUNKS_PER_THREAD: usize = 4;

/// A chunk is worth claiming by another thread if it costs about this many multiply-adds.
const MIN_CHUNK_COST: usize = 1 << 15;

thread_local! {
    static IN_JOB: Cell<bool> = const { Cell::new(false) };
}

/// A number of threads, the caller's included.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Held during a job: callers from several threads take turns.
    turn: Mutex<Company>,
}

struct Worker {
    parked: Arc<AtomicBool>,
    handle: JoinHandle<()>,
}

impl Pool {
    /// A pool of `threads` threads, of which the caller is one.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(Error::Threads { threads, max: MAX_THREADS });
        }
        let (shared, turn) = (Arc::default(), Mutex::default());
        let mut pool = Self { shared, workers: Vec::new(), turn };
        for i in 1..threads {
            let (shared, parked) = (pool.shared.clone(), Arc::<AtomicBool>::default());
            let flag = parked.clone();
            let handle = thread::Builder::new()
                .name(format!("apr-cpu-{i}"))
                .spawn(move || shared.work(&flag))?;
            pool.workers.push(Worker { parked, handle });
        }
        Ok(pool)
    }

    /// The number of threads, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        1 + self.workers.len()
    }

    /// Fills `out`, rows of `columns.count` elements each, strip by strip on all threads.
    ///
    /// # Panics
    /// If `out` is no whole number of rows, if `fill` panics, or within another job.
    pub(crate) fn fill<T: Send>(
        &self,
        out: &mut [T],
        columns: Columns,
        fill: impl Fn(Strip<'_, T>) + Sync,
    ) {
        if out.is_empty() {
            return;
        }
        let Columns { count: width, granule, cost } = columns;
        assert!(out.len().is_multiple_of(width), "an output of {} in rows of {width}", out.len());
        let rows = out.len() / width;
        let granules = width.div_ceil(granule);
        let worthwhile = granules.saturating_mul(cost) / MIN_CHUNK_COST;
        let chunks = (self.threads() * CHUNKS_PER_THREAD).min(granules).min(worthwhile).max(1);
        let output = Output(out.as_mut_ptr());
        self.run(chunks, &|chunk| {
            let cut = |i| (granules - left(granules, chunks, i)) * granule;
            let columns = cut(chunk).min(width)..cut(chunk + 1).min(width);
            fill(Strip { out: output.get(), rows, width, columns, output: PhantomData });
        });
    }

    /// Calls `run` once with each number below `chunks`.
    fn run(&self, chunks: usize, run: &(dyn Fn(usize) + Sync)) {
        assert!(!IN_JOB.get(), "a job of the thread pool must not start another one");
        let _in_job = InJob::enter();
        if chunks == 1 || self.workers.is_empty() {
            (0..chunks).for_each(run);
            return;
        }
        let mut company = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        if company.is_alone(start) {
            (0..chunks).for_each(run);
            return;
        }
        let job = Job { run, chunks, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        self.shared.open(&job);
        self.workers.iter().take(chunks - 1).for_each(Worker::wake);
        let own = job.work();
        if let Some(waiting) = self.shared.close() {
            // Whoever is still at work began its chunk before the caller found none left.
            let chunk = (waiting - start) / own.max(1) as u32;
            company.waited(chunk, waiting, Instant::now());
        }
        if let Some(payload) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(payload);
        }
    }
}

/// How much of `count` is left when `i` of `chunks` chunks have been taken: each chunk is smaller than the one before it, so that
/// threads that do not run equally fast still end at about the same time.
fn left(count: usize, chunks: usize, i: usize) -> usize {
    let i = chunks - i;
    (count * i * i).div_ceil(chunks * chunks).max(i)
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.handle.thread().unpark();
            // Workers catch the panics of jobs, and hand them to the caller.
            let _ = worker.handle.join();
        }
    }
}

impl Worker {
    fn wake(&self) {
        if self.parked.load(SeqCst) {
            self.handle.thread().unpark();
        }
    }
}

/// How the columns of a job's output may be cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Columns {
    /// Columns of the output.
    pub(crate) count: usize,
    /// Cuts are at multiples of this.
    pub(crate) granule: usize,
    /// About how many multiply-adds all rows of a granule cost.
    pub(crate) cost: usize,
}

/// A range of columns of an output, all rows of it: one chunk of a job.
pub(crate) struct Strip<'a, T> {
    out: *mut T,
    rows: usize,
    width: usize,
    columns: Range<usize>,
    output: PhantomData<&'a mut [T]>,
}

impl<T> Strip<'_, T> {
    /// The columns of this chunk.
    pub(crate) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// The part of row `row` that lies in these columns.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let start = row * self.width + self.columns.start;
        // SAFETY: `Pool::fill` checked that the output has `rows * width` elements, keeps `columns` within `width`, and gives
        // disjoint columns to the strips of a job; `&mut self` keeps the slices of one strip apart.
        unsafe { std::slice::from_raw_parts_mut(self.out.add(start), self.columns.len()) }
    }
}

/// The output of a job, to be cut into strips on any thread.
struct Output<T>(*mut T);

// SAFETY: it is only used to make strips, which are in effect disjoint `&mut [T]`.
unsafe impl<T: Send> Sync for Output<T> {}

impl<T> Output<T> {
    /// A method, so that closures capture the whole and not the pointer in it.
    fn get(&self) -> *mut T {
        self.0
    }
}

struct Job<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    chunks: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Claims chunks until there are none left, and says how many. After a panic there are none left.
    fn work(&self) -> usize {
        for own in 0.. {
            let chunk = self.next.fetch_add(1, Relaxed);
            if chunk >= self.chunks {
                return own;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (self.run)(chunk))) {
                self.next.store(self.chunks, Relaxed);
                let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(payload);
            }
        }
        unreachable!("there are not that many chunks")
    }
}

/// Whether the caller has the workers' help, or has been let down and goes on alone for now.
#[derive(Debug, Default)]
struct Company {
    /// The last time alone: until when, and for how long.
    alone: Option<(Instant, Duration)>,
}

impl Company {
    /// The first time alone. Each that follows soon is twice as long, up to the longest.
    const SHORTEST: Duration = Duration::from_millis(5);
    const LONGEST: Duration = Duration::from_millis(80);
    /// Waking up and interrupts take less than this on a machine that has nothing else to do; another program's turn takes
    /// more.
    const USUAL: Duration = Duration::from_millis(1);

    fn is_alone(&self, now: Instant) -> bool {
        self.alone.is_some_and(|(until, _)| now < until)
    }

    /// The caller had nothing left to do at `since`, and had to wait until `now` for others, who had a chunk each. If that is
    /// far longer than a chunk takes, one of them is not on its core.
    fn waited(&mut self, chunk: Duration, since: Instant, now: Instant) {
        if now - since <= 2 * chunk + Self::USUAL {
            return;
        }
        let pause = match self.alone {
            Some((until, last)) if now < until + 2 * last => (2 * last).min(Self::LONGEST),
            _ => Self::SHORTEST,
        };
        self.alone = Some((now + pause, pause));
    }
}

/// What the caller and the workers share.
///
/// `gate` holds the number of workers inside the job (the lower 16 bits), whether more may enter, and the number of the
/// job (the rest). The job itself lies on the caller's stack; the caller does not leave before the gate is closed
/// and nobody is inside.
struct Shared {
    gate: AtomicU64,
    job: UnsafeCell<*const Job<'static>>,
    stop: AtomicBool,
}

// SAFETY: `job` is written by the caller that holds `Pool::turn` while the gate is closed and nobody is inside, and read
// only by workers that are inside. What it points to is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

const INSIDE: u64 = 0xffff;
const OPEN: u64 = 0x1_0000;
const JOB: u64 = 0x2_0000;

impl Default for Shared {
    fn default() -> Self {
        Self {
            gate: AtomicU64::new(0),
            job: UnsafeCell::new(ptr::null()),
            stop: AtomicBool::new(false),
        }
    }
}

impl Shared {
    fn open(&self, job: &Job<'_>) {
        // SAFETY: the gate is closed and nobody is inside: the last job ended with `close`, and the caller
        // holds the turn.
        unsafe { *self.job.get() = ptr::from_ref(job).cast() };
        let number = self.gate.load(Relaxed) / JOB;
        self.gate.store((number + 1).wrapping_mul(JOB) | OPEN, SeqCst);
    }

    /// Lets nobody in any more and waits until everybody is out. Returns since when, if that took more than a moment.
    fn close(&self) -> Option<Instant> {
        self.gate.fetch_and(!OPEN, AcqRel);
        let (mut turns, mut since) = (0, None);
        while self.gate.load(Acquire) & INSIDE != 0 {
            turns += 1;
            // First on the core, then by giving it away, since the other thread may need it.
            if turns < IDLE_SPINS {
                hint::spin_loop();
            } else {
                since.get_or_insert_with(Instant::now);
                thread::yield_now();
            }
        }
        since
    }

    /// Whether there is a job other than number `last`.
    fn has_job_after(&self, last: u64) -> bool {
        let gate = self.gate.load(SeqCst);
        gate & OPEN != 0 && gate / JOB != last
    }

    /// Takes part in the open job, if it is not number `last`, and returns its number.
    fn take_part(&self, last: u64) -> Option<u64> {
        let mut gate = self.gate.load(Acquire);
        loop {
            if gate & OPEN == 0 || gate / JOB == last {
                return None;
            }
            match self.gate.compare_exchange_weak(gate, gate + 1, AcqRel, Acquire) {
                Ok(_) => break,
                Err(now) => gate = now,
            }
        }
        // SAFETY: this worker is inside an open gate, so the caller waits for it in `close` with the job on its stack.
        unsafe { (**self.job.get()).work() };
        self.gate.fetch_sub(1, Release);
        Some(gate / JOB)
    }

    /// The life of a worker.
    fn work(&self, parked: &AtomicBool) {
        IN_JOB.set(true);
        let (mut last, mut idle) = (0, 0);
        while !self.stop.load(Relaxed) {
            if let Some(job) = self.take_part(last) {
                (last, idle) = (job, 0);
            } else if idle < IDLE_SPINS {
                idle += 1;
                hint::spin_loop();
            } else {
                // The caller opens the gate, then looks at the flag; here it is the other way round, so one of the two sees
                // the other. An early `unpark` makes `park` return at once.
                parked.store(true, SeqCst);
                if !self.has_job_after(last) && !self.stop.load(SeqCst) {
                    thread::park();
                }
                parked.store(false, SeqCst);
                idle = 0;
            }
        }
    }
}

/// Marks the thread as being in a job, until dropped.
struct InJob;

impl InJob {
    fn enter() -> Self {
        IN_JOB.set(true);
        Self
    }
}

impl Drop for InJob {
    fn drop(&mut self) {
        IN_JOB.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPENSIVE: usize = 1 << 20;

    fn columns(count: usize, granule: usize) -> Columns {
        Columns { count, granule, cost: EXPENSIVE }
    }

    fn caught(f: impl FnOnce()) -> String {
        let payload = catch_unwind(AssertUnwindSafe(f)).expect_err("a panic");
        payload.downcast_ref::<&str>().map_or("other payload", |message| *message).to_owned()
    }

    #[test]
    fn every_element_is_filled_once_whatever_the_threads_and_cuts() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            for (rows, width, granule) in [(1, 1, 1), (3, 7, 2), (2, 64, 64), (1, 1000, 3)] {
                let mut out = vec![0u32; rows * width];
                pool.fill(&mut out, columns(width, granule), |mut strip| {
                    let columns = strip.columns();
                    assert!(columns.start.is_multiple_of(granule));
                    for row in 0..rows {
                        for (x, column) in strip.row(row).iter_mut().zip(columns.clone()) {
                            *x += (row * width + column) as u32 + 1;
                        }
                    }
                });
                assert!(out.iter().enumerate().all(|(i, &x)| x == i as u32 + 1), "{threads}");
            }
        }
    }

    #[test]
    fn chunks_become_smaller_and_none_is_empty() {
        for chunks in 1..20 {
            for count in chunks..200 {
                let sizes: Vec<_> = (0..chunks)
                    .map(|i| left(count, chunks, i) - left(count, chunks, i + 1))
                    .collect();
                assert_eq!(sizes.iter().sum::<usize>(), count);
                assert!(sizes.iter().all(|&size| size > 0), "{sizes:?}");
                // Each but for the rounding to whole ones.
                assert!(sizes.is_sorted_by(|a, b| a + 1 >= *b), "{sizes:?}");
            }
        }
    }

    #[test]
    fn many_short_jobs_in_a_row_all_end() {
        let pool = Pool::new(4).unwrap();
        let mut out = [0u32; 16];
        for _ in 0..2000 {
            pool.fill(&mut out, columns(16, 1), |mut strip| {
                strip.row(0).iter_mut().for_each(|x| *x += 1)
            });
        }
        assert_eq!(out, [2000; 16]);
    }

    #[test]
    fn workers_that_have_parked_do_not_miss_the_next_job() {
        let pool = Pool::new(3).unwrap();
        let mut out = [0u32; 8];
        for _ in 0..20 {
            thread::sleep(std::time::Duration::from_millis(1));
            pool.fill(&mut out, columns(8, 1), |mut strip| strip.row(0)[0] += 1);
        }
        assert_eq!(out, [20; 8]);
    }

    #[test]
    fn whoever_waits_for_long_goes_on_alone_and_longer_each_time() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let mut company = Company::default();
        company.waited(ms(4), start, start + ms(9));
        assert!(!company.is_alone(start + ms(9)), "about two chunks");
        company.waited(ms(0), start, start + ms(2));
        assert!(company.is_alone(start + ms(6)) && !company.is_alone(start + ms(7)));
        company.waited(ms(1), start + ms(8), start + ms(12));
        assert!(company.is_alone(start + ms(21)) && !company.is_alone(start + ms(22)));
        // After a time without waiting it begins anew.
        company.waited(ms(1), start + ms(90), start + ms(100));
        assert!(company.is_alone(start + ms(104)) && !company.is_alone(start + ms(105)));
        for _ in 0..20 {
            let (now, _) = company.alone.unwrap();
            company.waited(ms(1), now, now + ms(4));
        }
        assert_eq!(company.alone.unwrap().1, Company::LONGEST);
    }

    #[test]
    fn a_caller_alone_does_all_the_work() {
        let pool = Pool::new(3).unwrap();
        let later = Instant::now() + Duration::from_secs(60);
        pool.turn.lock().unwrap().alone = Some((later, Company::SHORTEST));
        let mut out = vec![pool.workers[0].handle.thread().id(); 64];
        pool.fill(&mut out, columns(64, 1), |mut strip| strip.row(0).fill(thread::current().id()));
        assert!(out.iter().all(|&id| id == thread::current().id()));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        let mut out = [0u32; 12];
        let message = caught(|| {
            pool.fill(&mut out, columns(12, 1), |strip| {
                assert!(strip.columns().start != 5, "five")
            });
        });
        assert_eq!(message, "five");
        pool.fill(&mut out, columns(12, 1), |mut strip| strip.row(0).fill(7));
        assert_eq!(out, [7; 12]);
    }

    #[test]
    fn a_job_within_a_job_is_refused_on_every_thread() {
        let pool = Pool::new(2).unwrap();
        let mut out = [0u32; 8];
        for cheap_or_not in [0, EXPENSIVE] {
            let message = caught(|| {
                pool.fill(&mut out, columns(8, 1), |_| {
                    let columns = Columns { count: 1, granule: 1, cost: cheap_or_not };
                    pool.fill(&mut [0u32], columns, |_| ());
                });
            });
            assert_eq!(message, "a job of the thread pool must not start another one");
        }
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2).unwrap();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut out = [0u32; 32];
                    for _ in 0..200 {
                        pool.fill(&mut out, columns(32, 1), |mut strip| {
                            strip.row(0).iter_mut().for_each(|x| *x += 1);
                        });
                    }
                    assert_eq!(out, [200; 32]);
                });
            }
        });
    }

    #[test]
    fn dropping_a_pool_joins_its_threads() {
        let pool = Pool::new(5).unwrap();
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        assert!(shared.upgrade().is_none(), "a worker still holds the shared state");
    }

    #[test]
    fn absurd_numbers_of_threads_are_refused() {
        for threads in [0, MAX_THREADS + 1] {
            assert!(Pool::new(threads).unwrap_err().to_string().contains("1 to 1024"));
        }
    }
}
