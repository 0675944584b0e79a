//! Connections that delay, lose and break. What was sent before an end was closed may still
//! arrive long after; what is sent into a dead connection never does.

use super::medium::{Dice, Stamp};
use flexnbd::migration::wire::{Answer, Handover, Question};
use flexnbd::range::Range;
use std::collections::VecDeque;

/// From the source.
#[derive(Clone, Debug)]
pub(crate) enum Up {
    Hello(Question),
    Write { cookie: u64, range: Range, stamps: Vec<Stamp> },
    Zero { cookie: u64, range: Range },
    Flush { cookie: u64 },
    Handover { cookie: u64, handover: Handover },
    Goodbye,
}

/// From the destination.
#[derive(Clone, Debug)]
pub(crate) enum Down {
    Welcome(Answer),
    Refused,
    Reply { cookie: u64, error: Option<u32> },
}

#[derive(Debug, Default)]
pub(crate) struct Connection {
    pub(crate) up: VecDeque<Up>,
    pub(crate) down: VecDeque<Down>,
    pub(crate) source_closed: bool,
    pub(crate) destination_closed: bool,
    /// Nothing sent from now on arrives, not even that an end was closed.
    pub(crate) dead: bool,
    /// The destination has found out that it is dead.
    pub(crate) noticed: bool,
}

impl Connection {
    pub(crate) fn send_up(&mut self, message: Up) {
        if !self.dead && !self.destination_closed {
            self.up.push_back(message);
        }
    }

    pub(crate) fn send_down(&mut self, message: Down) {
        if !self.dead && !self.source_closed {
            self.down.push_back(message);
        }
    }

    /// Whether the source can see that there is no more to come.
    pub(crate) fn ended_for_source(&self) -> bool {
        self.destination_closed && !self.dead && self.down.is_empty()
    }

    /// Whether the destination can see that there is no more to come.
    pub(crate) fn ended_for_destination(&self) -> bool {
        self.up.is_empty() && (self.noticed || self.source_closed && !self.dead)
    }

    /// Breaks; some of what is on its way has arrived already, in order.
    pub(crate) fn cut(&mut self, dice: &mut Dice) {
        self.up.truncate(dice.below(self.up.len() as u64 + 1) as usize);
        self.down.truncate(dice.below(self.down.len() as u64 + 1) as usize);
        self.dead = true;
    }
}

#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) up: bool,
    pub(crate) all: Vec<Connection>,
}

impl Net {
    pub(crate) fn open(&mut self) -> usize {
        self.all.push(Connection::default());
        self.all.len() - 1
    }
}
