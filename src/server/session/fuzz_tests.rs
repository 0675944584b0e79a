//! Fuzz targets of a session (`tests/fuzz`): requests to the engine, and snapshots of sessions.
//! A target for requests knows what every reply has to be (`model`); its disk (`disk`) completes operations in
//! another order than they began, may have to load bytes first, and may fail.

mod disk;
mod model;
mod requests;
mod snapshots;

pub(crate) use requests::requests;
pub(crate) use snapshots::snapshot;
