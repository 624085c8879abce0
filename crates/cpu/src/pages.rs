//! Memory for weights: large maps, cut into one piece after the other.
//!
//! Decoding reads all weights from end to end. With pages of 2 MiB it does so visibly faster than with those of 4 KiB, but a map
//! of its own for each matrix has its ends, and small matrices have nothing else, on small pages.

use std::{
    io,
    ops::Range,
    slice,
    sync::{Arc, Mutex, PoisonError},
};

use memmap2::{MmapMut, MmapRaw};

use crate::tile::Line;

/// What is asked of the system at once. It becomes memory only where it is written to.
const MAP_LINES: usize = (256 << 20) / size_of::<Line>();

/// Where weights get their memory from.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    current: Mutex<Option<Piece>>,
}

impl Pages {
    /// `len` lines of zeros.
    pub(crate) fn lines(&self, len: usize) -> io::Result<Piece> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(piece) = current.as_mut().and_then(|rest| rest.cut(len)) {
            return Ok(piece);
        }
        // What would leave little of a map gets one of its own, and so does what a system that counts every byte has room for.
        if len < MAP_LINES / 2
            && let Ok(mut rest) = Piece::mapped(MAP_LINES)
            && let Some(piece) = rest.cut(len)
        {
            *current = Some(rest);
            return Ok(piece);
        }
        Piece::mapped(len)
    }
}

/// Some lines of a map, in one hand.
#[derive(Debug)]
pub(crate) struct Piece {
    map: Arc<MmapRaw>,
    lines: Range<usize>,
}

impl Piece {
    fn mapped(len: usize) -> io::Result<Self> {
        // The system refuses maps of nothing.
        let map = MmapMut::map_anon((len * size_of::<Line>()).max(1))?;
        // It is advice.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { map: Arc::new(map.into()), lines: 0..len })
    }

    /// Takes the first `len` lines away, if there are as many.
    fn cut(&mut self, len: usize) -> Option<Self> {
        let end = self.lines.start.checked_add(len).filter(|&end| end <= self.lines.end)?;
        let lines = self.lines.start..end;
        self.lines.start = end;
        Some(Self { map: self.map.clone(), lines })
    }

    pub(crate) fn lines(&self) -> &[Line] {
        // SAFETY: the lines are within the map, which begins with a page and is plain bytes; no other piece has them.
        unsafe { slice::from_raw_parts(self.start(), self.lines.len()) }
    }

    pub(crate) fn lines_mut(&mut self) -> &mut [Line] {
        // SAFETY: as in `lines`.
        unsafe { slice::from_raw_parts_mut(self.start(), self.lines.len()) }
    }

    fn start(&self) -> *mut Line {
        self.map.as_mut_ptr().cast::<Line>().wrapping_add(self.lines.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_lie_one_behind_the_other_and_keep_apart() {
        let pages = Pages::default();
        let mut pieces = [3, 0, 5].map(|len| pages.lines(len).unwrap());
        for (piece, len) in pieces.iter().zip([3, 0, 5]) {
            assert_eq!(piece.lines().len(), len);
            assert!(piece.lines().iter().all(|line| line.0 == [0; 64]));
        }
        for (i, piece) in pieces.iter_mut().enumerate() {
            piece.lines_mut().fill(Line([i as u8; 64]));
        }
        let [first, none, last] = &pieces;
        assert_eq!(first.lines().as_ptr_range().end, last.lines().as_ptr());
        assert!(first.lines().iter().all(|line| line.0 == [0; 64]) && none.lines().is_empty());
        assert!(last.lines().iter().all(|line| line.0 == [2; 64]));
    }

    #[test]
    fn what_does_not_fit_begins_a_map_and_what_is_large_has_its_own() {
        let pages = Pages::default();
        let (half, large) = (MAP_LINES / 2 - 1, MAP_LINES / 2);
        let pieces = [half, large + 2, half, 2, half].map(|len| pages.lines(len).unwrap());
        let same = |a: usize, b: usize| Arc::ptr_eq(&pieces[a].map, &pieces[b].map);
        assert!(same(0, 2) && same(0, 3), "a large one in between changes nothing");
        assert!(!same(0, 1) && !same(0, 4));
        assert_eq!(pieces[1].map.len(), (large + 2) * size_of::<Line>());
        assert!(pages.lines(usize::MAX / size_of::<Line>()).is_err());
    }

    #[test]
    fn pieces_outlive_where_they_came_from() {
        let pages = Pages::default();
        let mut piece = pages.lines(1).unwrap();
        drop(pages);
        piece.lines_mut()[0] = Line([7; 64]);
        assert_eq!(piece.lines()[0].0, [7; 64]);
    }
}
