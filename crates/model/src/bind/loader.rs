//! Taking tensors to a backend, in front of whoever wants to know how far it is.

use std::{
    cell::{Cell, RefCell},
    ops::ControlFlow,
};

use apr_format::Checkpoint;

use super::weights::{Keeper, Named};
use crate::{Backend, Error, Result};

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Bytes of tensors that the backend has taken.
    pub bytes: u64,
    /// Those of all tensors, a few of which need not be taken: rotary factors, a tied head that is stored all the same.
    pub total: u64,
}

/// Who is told after each tensor, and may stop the loading.
pub type LoadWatch<'a> = dyn FnMut(Loaded) -> ControlFlow<()> + 'a;

/// Takes tensors to a backend.
pub(crate) struct Loader<'a, B> {
    backend: &'a B,
    bytes: Cell<u64>,
    total: u64,
    watch: RefCell<&'a mut LoadWatch<'a>>,
}

impl<'a, B> Loader<'a, B> {
    pub(crate) fn new(
        backend: &'a B,
        checkpoint: &Checkpoint,
        watch: &'a mut LoadWatch<'a>,
    ) -> Self {
        let total = checkpoint.tensors().map(|(_, stored)| stored.bytes().len() as u64).sum();
        Self { backend, bytes: Cell::new(0), total, watch: RefCell::new(watch) }
    }

    fn taken(&self, parts: &[Named]) -> Result<()> {
        self.bytes.update(|bytes| bytes + parts.iter().map(Named::bytes).sum::<u64>());
        let loaded = Loaded { bytes: self.bytes.get(), total: self.total };
        match (self.watch.borrow_mut())(loaded) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::LoadingStopped),
        }
    }
}

impl<B: Backend> Keeper for Loader<'_, B> {
    type Matrix = B::Weight;
    type Vector = B::Vector;

    fn matrix(&self, parts: &[Named]) -> Result<B::Weight> {
        let weight = self.backend.weight(&Named::all_stored(parts)?);
        let weight = weight.map_err(|error| Named::blame(parts, error))?;
        self.taken(parts)?;
        Ok(weight)
    }

    fn vector(&self, parts: &[Named]) -> Result<B::Vector> {
        let vector = self.backend.vector(&Named::all_stored(parts)?);
        let vector = vector.map_err(|error| Named::blame(parts, error))?;
        self.taken(parts)?;
        Ok(vector)
    }
}
