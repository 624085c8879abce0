//! Models of the Hugging Face hub: what a repository holds, what of it a model needs, and those files, checked, in the
//! cache that other tools share.
//!
//! Start at [`Hub::list`], choose with [`choose`], then [`Hub::pull`]. Without a network, [`Cache::list`] does the first.
//! This crate reads no environment and prints nothing: endpoint, token and cache come in [`Options`], progress goes
//! out as [`Event`]s. It knows nothing of what is in the files. (Only the HTTP client below looks for a proxy by itself.)
//!
//! Requests are made by the client of `hf-hub`, which knows the hub's routes, headers, and where tokens may be
//! sent; so do the names in its cache. Its `download` is not used. It gives a file its final name before anybody
//! could check it, appends whole files to parts where a server ignores `Range`, cannot finish a part that is
//! complete, waits without a limit on a connection that has died, and keeps the headers to itself in which the hub says why
//! it refuses. `transfer.rs` is that part, anew.
//!
//! No file is ever under its final name with bytes that are not the hub's: bytes go to `blobs/ETAG.incomplete`, and are renamed
//! when size and checksum are right. What is wrong goes to `blobs/ETAG.corrupt`, to be looked at.

mod cache;
mod checksum;
mod client;
mod error;
mod listing;
mod model;
mod pull;
mod select;
mod transfer;

pub use cache::Cache;
pub use checksum::Checksum;
pub use client::{DEFAULT_ENDPOINT, Hub, Options, Token};
pub use error::{Error, Result};
pub use listing::{Listing, RemoteFile};
pub use model::{ModelName, Revision};
pub use pull::{Event, Pulled, PulledFile};
pub use select::{Candidate, Selection, Want, choose};
