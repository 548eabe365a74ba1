//! The store over a real Redis: answering, slow, loading, gone, and written to by somebody who should not.

mod locks;
mod redis;
mod registry;

use std::time::{Duration, SystemTime};

use headgate_store::Redis;
use headgate_testkit::{services::Service, soon};

/// What a turn may wait for Redis.
const BUDGET: Duration = Duration::from_millis(20);

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// A wait that only a Redis that does not answer at all uses up: where it counts what is said, and not how fast.
const PATIENT: Duration = Duration::from_secs(10);

/// A connection that is there, with a turn's budget.
async fn connected(redis: &Service) -> Redis {
    connected_within(redis, BUDGET).await
}

async fn connected_within(redis: &Service, budget: Duration) -> Redis {
    let connection = Redis::connect(&format!("redis://{}", redis.addr()), budget).unwrap();
    soon(connection.up(), "redis").await;
    connection
}
