//! A timer for what nearly always comes before its time.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Never, in seconds of a clock that has to be able to say it: thirty years.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// Rings at a time, once. Whoever asks before that, and will be woken then, is answered without a look at the runtime's timer: of a
/// thousand streams each would have to fetch it into the cache with each of its events.
pub struct Alarm {
    at: Instant,
    /// Who is woken when it rings.
    waker: Option<Waker>,
    timer: Pin<Box<Sleep>>,
}

impl Alarm {
    /// One that rings at this time.
    pub fn new(at: Instant) -> Alarm {
        Alarm { at, waker: None, timer: Box::pin(sleep_until(at)) }
    }

    /// One that rings after so long.
    pub fn after(wait: Duration) -> Alarm {
        let now = Instant::now();
        Alarm::new(now.checked_add(wait).unwrap_or(now + FAR))
    }

    /// When it rings.
    pub fn at(&self) -> Instant {
        self.at
    }

    /// Has it ring at this time, also if it has rung already.
    pub fn set(&mut self, at: Instant) {
        (self.at, self.waker) = (at, None);
        self.timer.as_mut().reset(at);
    }

    /// Ready when it rings; else whoever asks is woken then. `now`: a look at the clock in this very poll, not one before it.
    pub fn poll(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<()> {
        // Before its time it has not rung, so that whoever is remembered is still to be woken.
        if now < self.at && self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        self.waker = None;
        let rung = self.timer.as_mut().poll(cx);
        if rung.is_pending() {
            self.waker = Some(cx.waker().clone());
        }
        rung
    }

    /// Waits until it rings. Cancel safe.
    pub async fn ring(&mut self) {
        poll_fn(|cx| self.poll(cx, Instant::now())).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, task::Wake};

    use tokio::{sync::Notify, time::timeout};

    use super::*;

    struct Told(Notify);

    impl Wake for Told {
        fn wake(self: Arc<Self>) {
            self.0.notify_one();
        }
    }

    fn told() -> (Arc<Told>, Waker) {
        let told = Arc::new(Told(Notify::new()));
        (told.clone(), told.into())
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn who_asks_last_is_woken_at_its_time_however_often_it_was_asked() {
        let begun = Instant::now();
        let mut alarm = Alarm::new(begun + SECOND);
        let (first, waker) = told();
        let (second, other) = told();
        for waker in [&waker, &waker, &other, &waker, &other, &other] {
            assert!(alarm.poll(&mut Context::from_waker(waker), Instant::now()).is_pending());
        }
        second.0.notified().await;
        assert_eq!(begun.elapsed(), SECOND);
        assert!(alarm.poll(&mut Context::from_waker(&other), Instant::now()).is_ready());
        assert!(timeout(SECOND, first.0.notified()).await.is_err(), "nobody else is");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_never_to_ring_waits_as_any_other() {
        let mut alarm = Alarm::after(Duration::MAX);
        assert!(timeout(SECOND, alarm.ring()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_set_again_rings_again_sooner_or_later_than_before() {
        let begun = Instant::now();
        let mut alarm = Alarm::new(begun + SECOND);
        let (_, waker) = told();
        assert!(alarm.poll(&mut Context::from_waker(&waker), Instant::now()).is_pending());
        alarm.set(begun + SECOND / 2);
        alarm.ring().await;
        assert_eq!(begun.elapsed(), SECOND / 2);
        alarm.set(begun + 3 * SECOND);
        assert_eq!(alarm.at(), begun + 3 * SECOND);
        alarm.ring().await;
        assert_eq!(begun.elapsed(), 3 * SECOND);
    }
}
