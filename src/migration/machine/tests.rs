//! One life after another of the source's machine, event by event.
