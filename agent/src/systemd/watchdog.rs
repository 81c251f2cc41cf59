//! Tells systemd that the agent makes progress (`WatchdogSec=`), and only when it does: each time a probe has gone the
//! way of a request. An agent that hangs is killed and started again.

use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Something that returns when all parts of the agent have answered, and hangs or panics when one does not.
pub type Probe = Arc<dyn Fn() + Send + Sync>;

/// Feeds the watchdog until `stop`, if systemd wants that.
pub async fn run(probe: Probe, stop: CancellationToken) {
    let Some(patience) = sd_notify::watchdog_enabled() else { return };
    let feed = || {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    };
    watch(patience, probe, feed, stop).await;
}

async fn watch(patience: Duration, probe: Probe, feed: impl Fn(), stop: CancellationToken) {
    let mut ticks = tokio::time::interval(patience / 4);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let probe = probe.clone();
        let mut probing = tokio::task::spawn_blocking(move || probe());
        let mut warned = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                probed = &mut probing => {
                    match probed {
                        Ok(()) => feed(),
                        Err(error) => tracing::error!(%error, "the watchdog's probe failed"),
                    }
                    break;
                }
                _ = ticks.tick() => {
                    if !std::mem::replace(&mut warned, true) {
                        tracing::error!(
                            "the agent makes no progress: systemd will start it again if that lasts {} s",
                            patience.as_secs()
                        );
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    /// Counts meals, and waits for them.
    #[derive(Default)]
    struct Dog {
        fed: AtomicUsize,
        changed: tokio::sync::Notify,
    }

    impl Dog {
        fn feed(&self) {
            self.fed.fetch_add(1, Ordering::SeqCst);
            self.changed.notify_one();
        }

        async fn fed(&self, times: usize) {
            while self.fed.load(Ordering::SeqCst) < times {
                self.changed.notified().await;
            }
        }
    }

    #[tokio::test]
    async fn it_is_fed_only_while_the_probe_comes_back() {
        let dog = Arc::new(Dog::default());
        let (sender, permits) = mpsc::channel::<()>();
        let permits = std::sync::Mutex::new(permits);
        let entered = Arc::new(AtomicUsize::new(0));
        let probe: Probe = {
            let entered = entered.clone();
            Arc::new(move || {
                entered.fetch_add(1, Ordering::SeqCst);
                permits.lock().unwrap().recv().unwrap();
            })
        };
        let stop = CancellationToken::new();
        let watching = {
            let (dog, stop) = (dog.clone(), stop.clone());
            tokio::spawn(
                async move { watch(Duration::from_millis(4), probe, move || dog.feed(), stop).await },
            )
        };
        sender.send(()).unwrap();
        sender.send(()).unwrap();
        dog.fed(2).await;
        // The third hangs: many ticks pass, and there is neither a meal nor a second probe.
        while entered.load(Ordering::SeqCst) < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
        assert_eq!((dog.fed.load(Ordering::SeqCst), entered.load(Ordering::SeqCst)), (2, 3));
        sender.send(()).unwrap();
        dog.fed(3).await;
        // A probe that panics does not count as progress either.
        drop(sender);
        while entered.load(Ordering::SeqCst) < 5 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(dog.fed.load(Ordering::SeqCst), 3);
        stop.cancel();
        watching.await.unwrap();
    }
}
