//! Executes an operation synchronously: on a thread of the pool, or where there is no queue.

use super::backend::Backend;
use super::detect_zeros;
use super::extents::extents;
use super::op::Op;
use std::io;

/// Executes an operation synchronously. A zeroing or trim is not made durable: `inflight` flushes
/// after its last part.
pub(super) fn execute(image: &dyn Backend, op: &mut Op) -> io::Result<()> {
    match op {
        Op::Read { offset, data } => image.read(*offset, data),
        Op::Write { offset, data, durable: true } => image.write(*offset, data, true),
        Op::Write { offset, data, durable: false } => {
            detect_zeros::write_around_holes(image, *offset, data)
        }
        Op::Flush => image.flush(),
        Op::Extents { range, limit, found } => {
            *found = extents(image, *range, *limit)?;
            Ok(())
        }
        other => image.execute(other),
    }
}
