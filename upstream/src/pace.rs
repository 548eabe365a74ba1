//! Fewer acknowledgements: events that come quickly are acknowledged several at a time.
//!
//! Linux acknowledges every small segment as soon as it is read, except where both sides talk; that is a packet for each event of
//! a stream, and a fifth of what the event costs. `docs/decisions/0243-quick-events-share-an-acknowledgement.md` has the figures.

use std::time::Duration;

use crate::connect::Io;

/// How quickly one connection's events come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// So many reads were quick, in a row.
    Learning(u8),
    /// The system was asked for fewer acknowledgements that many reads ago.
    Quick(u8),
    /// It stopped as soon as there were fewer, so it waits for them (Nagle's algorithm): it has one for every read, for good.
    Waits,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace::Learning(0)
    }
}

impl Pace {
    /// A quick read comes sooner after the one before it: well within the 40 ms by which Linux delays an acknowledgement
    /// (`TCP_DELACK_MIN`; RFC 9293 section 3.8.6.3 allows half a second). Slower ones would have one each all the same.
    const QUICK: Duration = Duration::from_millis(30);
    /// Reads until it is asked again: the system goes back to its habit the first time that it has delayed one in vain.
    const AGAIN: u8 = 32;

    /// After each read of `io`. `gap`: since the read before it.
    pub(crate) fn read(&mut self, io: &Io, gap: Duration) {
        if self.asks(gap) {
            // Where it cannot be had, all works as well, only dearer.
            #[cfg(target_os = "linux")]
            let _ = io.tcp().set_quickack(false);
            #[cfg(not(target_os = "linux"))]
            let _ = io.tcp();
        }
    }

    /// Whether now is the time to ask for fewer.
    fn asks(&mut self, gap: Duration) -> bool {
        *self = match (*self, gap < Pace::QUICK) {
            (Pace::Learning(0), true) => Pace::Learning(1),
            (Pace::Learning(_), false) => Pace::Learning(0),
            (Pace::Learning(_) | Pace::Quick(Pace::AGAIN), true) => Pace::Quick(0),
            // Who waits for acknowledgements sends once more, as nothing of theirs is unacknowledged, and then stops.
            (Pace::Quick(0 | 1), false) | (Pace::Waits, _) => Pace::Waits,
            (Pace::Quick(reads), _) => Pace::Quick((reads + 1).min(Pace::AGAIN)),
        };
        *self == Pace::Quick(0)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// At which reads fewer acknowledgements are asked for, given the gaps before the reads in milliseconds.
    fn asked(gaps: impl IntoIterator<Item = u64>) -> Vec<usize> {
        let mut pace = Pace::default();
        let reads = gaps.into_iter().enumerate();
        reads.filter_map(|(read, gap)| pace.asks(Duration::from_millis(gap)).then_some(read)).collect()
    }

    #[test]
    fn quick_events_are_acknowledged_less_often_and_the_system_is_reminded() {
        assert_eq!(asked([20; 70]), [1, 34, 67]);
    }

    #[test]
    fn slow_events_and_single_ones_are_left_to_the_system() {
        assert_eq!(asked([50; 100]), [] as [usize; 0]);
        assert_eq!(asked([800, 2, 800, 2, 800, 2]), [] as [usize; 0]);
    }

    #[test]
    fn a_pause_is_forgiven_and_the_reminder_waits_for_quick_events() {
        let mut gaps = [10; 60];
        gaps[0] = 900;
        gaps[35] = 3000;
        assert_eq!(asked(gaps), [2, 36]);
    }

    #[test]
    fn who_waits_for_acknowledgements_is_kept_waiting_once() {
        // The second read after the asking comes only with the delayed acknowledgement.
        let gaps = [5, 5, 5, 39].into_iter().chain([5; 300]);
        assert_eq!(asked(gaps), [1]);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_system_is_asked() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let io = Io::Plain(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let mut pace = Pace::default();
        let mut quick = || {
            pace.read(&io, Duration::from_millis(1));
            io.tcp().quickack().unwrap()
        };
        assert_eq!([quick(), quick()], [true, false]);
    }
}
