//! Buffers for bytes on their way out, which a worker lends to whichever of its streams has some: one that waits has none.

use std::cell::RefCell;

/// The most buffers that a worker keeps, and the largest: a turn needs two at a time, its ring's and its connection's.
const MAX_KEPT: usize = 8;
const MAX_KEPT_BYTES: usize = 64 << 10;

thread_local! {
    static KEPT: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer, with room in it where one is at hand.
pub(crate) fn lend() -> Vec<u8> {
    // A stream may outlive its thread's buffers by a moment: then it has a buffer of its own.
    KEPT.try_with(|kept| kept.borrow_mut().pop()).ok().flatten().unwrap_or_default()
}

/// Takes a buffer back, whoever lent it, and leaves one without room.
pub(crate) fn give_back(buffer: &mut Vec<u8>) {
    let mut buffer = std::mem::take(buffer);
    if (1..=MAX_KEPT_BYTES).contains(&buffer.capacity()) {
        buffer.clear();
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            if kept.len() < MAX_KEPT {
                kept.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_was_given_back_is_lent_again_empty_unless_it_grew_too_large() {
        let mut buffer = lend();
        buffer.extend_from_slice(&[1; 1000]);
        let room = buffer.capacity();
        give_back(&mut buffer);
        assert_eq!(buffer.capacity(), 0);
        let again = lend();
        assert_eq!((again.len(), again.capacity()), (0, room));
        give_back(&mut vec![1; MAX_KEPT_BYTES + 1]);
        assert_eq!(lend().capacity(), 0);
    }
}
