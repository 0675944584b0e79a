//! Fuzz target of the messages between two flexnbd (`tests/fuzz`): each has one encoding.

use super::wire::{Answer, DiskIdMessage, Handover, Question};

/// Decodes the bytes as each message.
pub(crate) fn messages(bytes: &[u8]) {
    if let Ok(question) = Question::decode(bytes) {
        assert_eq!(question.encode(), bytes);
    }
    if let Ok(answer) = Answer::decode(bytes) {
        assert_eq!(answer.encode(), bytes);
    }
    if let Some(message) = DiskIdMessage::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
    if let Ok(handover) = Handover::decode(bytes) {
        assert_eq!(handover.encode(), bytes);
    }
}
