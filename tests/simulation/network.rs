//! Modelled connections that delay messages, lose them and break. Messages sent before an end was
//! closed may arrive long after; messages sent into a broken connection never arrive.

use super::image::{Rng, Stamp};
use flexnbd::migration::wire::{Answer, Handover, Question};
use flexnbd::range::Range;
use std::collections::VecDeque;

/// From the source.
#[derive(Clone, Debug)]
pub(crate) enum ToDestination {
    Question(Question),
    Write { cookie: u64, range: Range, stamps: Vec<Stamp> },
    Zero { cookie: u64, range: Range },
    Flush { cookie: u64 },
    Handover { cookie: u64, handover: Handover },
    Disconnect,
}

/// From the destination.
#[derive(Clone, Debug)]
pub(crate) enum ToSource {
    Answer(Answer),
    Refused,
    Reply { cookie: u64, error: Option<u32> },
}

#[derive(Debug, Default)]
pub(crate) struct Connection {
    pub(crate) to_destination: VecDeque<ToDestination>,
    pub(crate) to_source: VecDeque<ToSource>,
    pub(crate) source_closed: bool,
    pub(crate) destination_closed: bool,
    /// From now on nothing sent arrives, and neither end learns that the other was closed.
    pub(crate) is_broken: bool,
    /// The destination has detected that it is broken.
    pub(crate) break_detected: bool,
}

impl Connection {
    pub(crate) fn send_to_destination(&mut self, message: ToDestination) {
        if !self.is_broken && !self.destination_closed {
            self.to_destination.push_back(message);
        }
    }

    pub(crate) fn send_to_source(&mut self, message: ToSource) {
        if !self.is_broken && !self.source_closed {
            self.to_source.push_back(message);
        }
    }

    /// Whether the source reads EOF.
    pub(crate) fn ended_for_source(&self) -> bool {
        self.destination_closed && !self.is_broken && self.to_source.is_empty()
    }

    /// Whether the destination reads EOF or an error.
    pub(crate) fn ended_for_destination(&self) -> bool {
        self.to_destination.is_empty()
            && (self.break_detected || self.source_closed && !self.is_broken)
    }

    /// Breaks the connection. Of the messages in transit the first ones, an arbitrary number of them,
    /// have already arrived.
    pub(crate) fn cut(&mut self, rng: &mut Rng) {
        self.to_destination.truncate(rng.below(self.to_destination.len() as u64 + 1) as usize);
        self.to_source.truncate(rng.below(self.to_source.len() as u64 + 1) as usize);
        self.is_broken = true;
    }
}

#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) is_up: bool,
    pub(crate) connections: Vec<Connection>,
}

impl Network {
    /// Opens a connection; returns its index.
    pub(crate) fn open(&mut self) -> usize {
        self.connections.push(Connection::default());
        self.connections.len() - 1
    }
}
