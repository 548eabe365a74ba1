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

/// A connection that is there.
async fn connected(redis: &Service) -> Redis {
    let connection = Redis::connect(&format!("redis://{}", redis.addr()), BUDGET).unwrap();
    soon(connection.up(), "redis").await;
    connection
}
