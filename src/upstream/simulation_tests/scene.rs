//! What a scripted server needs of its world.

use super::cells::CellModel;
use super::coverage::UpstreamCoverage;
use super::image::ScriptedImage;

/// Borrowed from the fields of the world.
pub(super) struct Scene<'a> {
    pub(super) rng: &'a mut fastrand::Rng,
    pub(super) image: &'a mut ScriptedImage,
    pub(super) model: &'a mut CellModel,
    pub(super) coverage: &'a mut UpstreamCoverage,
}
