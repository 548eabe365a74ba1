//! The log on a real disk, with the disk's answers held back or spoiled where that is the point.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize},
        mpsc as gate,
    },
    time::{Duration, SystemTime},
};

use futures_util::FutureExt;
use headgate_contracts::{
    Fault, TurnId,
    wire::{
        conversation::{DeliveryReport, DenialReport},
        log::{Accepted, Event, InputVerdict, Kind},
    },
};
use headgate_testkit::services::Missing;

use super::{
    record::{Record, record_bytes},
    *,
};

fn settings(folder: &Path) -> Settings {
    Settings { folder: folder.to_owned(), cap: Settings::LEAST_CAP, turns: 4096, topic: None, keys: None }
}

/// A folder whose disk answers at once, where the system has one: these tests ask it thousands of times.
fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn open(folder: &Path) -> (Log, Recovered) {
    Log::open(&settings(folder)).unwrap()
}

fn of(turn: TurnId) -> Beginning {
    of_session(turn, "s1")
}

/// The first facts of a turn of a session of that name.
pub(super) fn accepted(session: &str) -> Accepted {
    Accepted {
        tenant: "acme".parse().unwrap(),
        session: session.parse().unwrap(),
        subject: "u1".parse().unwrap(),
        route: "stream".into(),
        model: None,
        messages: 1,
        body_bytes: 100,
        body_digest: "sha-256=:x:".into(),
    }
}

pub(super) fn verdict(decision: &str) -> InputVerdict {
    InputVerdict {
        verdict: "jti".into(),
        issuer: "headgate".into(),
        decision: decision.into(),
        categories: Vec::new(),
        policy: "default".into(),
        policy_version: "7".into(),
        constitution: "sha-256=:y:".into(),
        mode: None,
        fence: None,
        subject: None,
    }
}

/// A turn of that session.
pub(super) fn of_session(turn: TurnId, session: &str) -> Beginning {
    let accepted = Event::accepted(turn, SystemTime::now(), "00-a-b-01".into(), accepted(session));
    Beginning::new(accepted.clone(), accepted.followed_by(Kind::InputVerdict, SystemTime::now(), verdict("allow")))
}

async fn begin(log: &Log) -> Account {
    log.begin(of(TurnId::fresh())).await.unwrap()
}

fn complete(account: Account) {
    account.close(&Ok(()), Finish::Stop, Progress::default());
}

async fn whole_turn(log: &Log) {
    complete(begin(log).await);
}

fn good(folder: &Path) -> Judged {
    let judged = verify(folder).unwrap();
    assert!(judged.is_good(), "{:?}", judged.violations);
    judged
}

/// The segments' numbers.
fn segments(folder: &Path) -> Vec<u64> {
    segment::list(folder).unwrap()
}

fn file(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:010}.events"))
}

/// A log whose disk waits at a gate before each answer.
struct Gated {
    log: Arc<Log>,
    /// One message per group that was written and waits.
    written: gate::Receiver<()>,
    pass: gate::Sender<()>,
}

fn gated(folder: &Path) -> Gated {
    let (tell, written) = gate::channel();
    let (pass, gate) = gate::channel();
    let sync = move |file: &File| {
        let _ = tell.send(());
        // Without anybody to pass, the gate is open.
        let _ = gate.recv();
        file.sync_data()
    };
    let (log, _) = Log::open_with(&settings(folder), Box::new(sync)).unwrap();
    Gated { log: Arc::new(log), written, pass }
}

#[tokio::test]
async fn a_turn_is_acknowledged_only_after_its_beginning_is_durable() {
    let folder = in_memory();
    let Gated { log, written, pass } = gated(folder.path());
    let first = begin(&log);
    tokio::pin!(first);
    assert!(first.as_mut().now_or_never().is_none());
    // Its records are in the file, and the disk has been asked: not an acknowledgement.
    written.recv().unwrap();
    assert_eq!(verify(folder.path()).unwrap().records, 2);
    assert!(first.as_mut().now_or_never().is_none());
    assert_eq!(log.durable(), 0);
    pass.send(()).unwrap();
    let _first = first.await;
    assert_eq!(log.durable(), 2);
    drop(pass);
}

#[tokio::test]
async fn what_gathers_while_the_disk_is_busy_is_one_group() {
    let folder = in_memory();
    let Gated { log, written, pass } = gated(folder.path());
    let mut first = Box::pin(begin(&log));
    assert!(first.as_mut().now_or_never().is_none());
    written.recv().unwrap();
    let mut gathered: Vec<_> = (0..50).map(|_| Box::pin(begin(&log))).collect();
    assert!(gathered.iter_mut().all(|turn| turn.as_mut().now_or_never().is_none()));
    pass.send(()).unwrap();
    written.recv().unwrap();
    pass.send(()).unwrap();
    let accounts = futures_util::future::join_all(gathered).await;
    assert_eq!((accounts.len(), log.durable()), (50, 102));
    assert!(written.try_recv().is_err(), "one sync for fifty turns");
    drop(pass);
}

#[tokio::test]
async fn a_turn_whose_caller_leaves_before_it_is_acknowledged_is_cancelled() {
    let folder = in_memory();
    let Gated { log, written, pass } = gated(folder.path());
    let mut left = Box::pin(begin(&log));
    assert!(left.as_mut().now_or_never().is_none());
    written.recv().unwrap();
    drop(left);
    drop(pass);
    log.flush().await.unwrap();
    let judged = good(folder.path());
    assert_eq!((judged.begun, judged.ended, judged.open.len()), (1, 1, 0));
}

#[tokio::test]
async fn more_turns_than_may_wait_for_the_disk_are_refused_and_what_has_begun_can_end() {
    let folder = in_memory();
    let (tell, written) = gate::channel();
    let (pass, gate) = gate::channel::<()>();
    let sync = move |file: &File| {
        let _ = (tell.send(()), gate.recv());
        file.sync_data()
    };
    let (log, _) = Log::open_with(&Settings { turns: 2, ..settings(folder.path()) }, Box::new(sync)).unwrap();
    pass.send(()).unwrap();
    let open = begin(&log).await;
    written.recv().unwrap();
    let mut busy = Box::pin(begin(&log));
    assert!(busy.as_mut().now_or_never().is_none());
    written.recv().unwrap();
    let mut waiting = Vec::new();
    let refused = loop {
        let mut next = Box::pin(log.begin(of(TurnId::fresh())));
        match next.as_mut().now_or_never() {
            None => waiting.push(next),
            Some(refused) => break refused.err(),
        }
        assert!(waiting.len() < 100, "the queue has a bound");
    };
    assert_eq!(refused, Some(Refused::Behind));
    complete(open);
    drop((busy, waiting, pass));
    log.flush().await.unwrap();
    assert_eq!(good(folder.path()).open, []);
}

#[tokio::test]
async fn a_turn_without_an_end_gets_one_at_the_next_start_and_no_second() {
    let folder = in_memory();
    let (log, recovered) = open(folder.path());
    assert_eq!(recovered, Recovered::default());
    whole_turn(&log).await;
    let running = begin(&log).await;
    log.flush().await.unwrap();
    assert_eq!(good(folder.path()).open.len(), 1);
    // What a killed process leaves: nobody closes the account, and the lock is gone.
    let left = copied(folder.path());
    let (again, recovered) = open(left.path());
    assert_eq!((recovered.records, recovered.crashed, recovered.torn_bytes), (5, 1, 0));
    let judged = good(left.path());
    assert_eq!((judged.begun, judged.ended, judged.crashed, judged.open.len()), (2, 2, 1, 0));
    whole_turn(&again).await;
    again.flush().await.unwrap();
    drop(again);
    let (_, recovered) = open(left.path());
    assert_eq!((recovered.records, recovered.crashed), (9, 0));
    good(left.path());
    complete(running);
}

/// The log's files in a folder of their own, as they are on the disk at this moment.
fn copied(folder: &Path) -> tempfile::TempDir {
    let copy = in_memory();
    for number in segments(folder) {
        fs::copy(file(folder, number), file(copy.path(), number)).unwrap();
    }
    copy
}

#[tokio::test]
async fn a_turn_id_is_taken_once_even_across_a_start() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    let turn = TurnId::fresh();
    let account = log.begin(of(turn)).await.unwrap();
    assert_eq!(log.begin(of(turn)).await.err(), Some(Refused::Known));
    complete(account);
    assert_eq!(log.begin(of(turn)).await.err(), Some(Refused::Known));
    log.flush().await.unwrap();
    drop(log);
    let (log, _) = open(folder.path());
    assert_eq!(log.begin(of(turn)).await.err(), Some(Refused::Known));
    let judged = good(folder.path());
    assert_eq!((judged.begun, judged.ended), (1, 1));
}

/// A log of two whole turns and one that was being begun, in one segment: its bytes, and where its last record begins.
async fn three_turns() -> (Vec<u8>, usize) {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    whole_turn(&log).await;
    whole_turn(&log).await;
    log.flush().await.unwrap();
    let running = begin(&log).await;
    let mut bytes = fs::read(file(folder.path(), 1)).unwrap();
    complete(running);
    let mut reader = segment::Reader::new(segment::open(folder.path(), 1).unwrap());
    for _ in 0..7 {
        assert!(matches!(reader.next().unwrap(), record::Read::Record(_)));
    }
    // Less of the room that was taken in advance than there is: it is read a thousand times.
    bytes.truncate(8192);
    (bytes, usize::try_from(reader.at()).unwrap())
}

#[tokio::test]
async fn a_log_torn_at_any_byte_of_its_last_record_loses_that_record_and_nothing_else() {
    let (bytes, last) = three_turns().await;
    let end = last + record_bytes(Entry::at(&bytes, last).event.len());
    for torn in last..end {
        for zeroed in [true, false] {
            let folder = in_memory();
            let mut left = bytes[..torn].to_vec();
            // A file with room taken in advance, or one that ends there.
            left.resize(if zeroed { end + 4096 } else { torn }, 0);
            fs::write(file(folder.path(), 1), left).unwrap();
            let padding_alone = bytes[torn..end].iter().all(|byte| *byte == 0) && zeroed;
            let (log, recovered) = open(folder.path());
            let stands = if padding_alone { 8 } else { 7 };
            assert_eq!((recovered.records, recovered.crashed), (stands, 1), "torn at {torn}, {zeroed}");
            drop(log);
            let judged = good(folder.path());
            assert_eq!((judged.records, judged.ended, judged.torn_bytes), (stands + 1, 3, 0));
        }
    }
}

impl Entry {
    /// The record at a place of a segment.
    fn at(bytes: &[u8], at: usize) -> Entry {
        match record::read(&bytes[at..]) {
            record::Read::Record(record) => {
                Entry { number: record.number, part: record.part, turn: record.turn, event: record.event.to_vec() }
            }
            found => panic!("{found:?} at {at}"),
        }
    }
}

#[tokio::test]
async fn a_flipped_bit_in_what_was_durable_is_damage_and_never_cut_off() {
    let (bytes, last) = three_turns().await;
    // The third turn's group calls everything before it durable.
    let group = last - record_bytes(Entry::at(&bytes, 0).event.len());
    assert_eq!(Entry::at(&bytes, group).number, 7);
    let folder = in_memory();
    for at in (0..group).step_by(7) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(file(folder.path(), 1), &flipped).unwrap();
        let refused = Log::open(&settings(folder.path())).err();
        assert!(matches!(refused, Some(Unopened::Damaged { .. })), "byte {at}: {refused:?}");
        assert_eq!(fs::read(file(folder.path(), 1)).unwrap(), flipped, "evidence is left alone");
        assert!(!verify(folder.path()).unwrap().is_good(), "byte {at}");
    }
}

#[tokio::test]
async fn a_write_that_the_disk_does_not_take_seals_the_log_for_good() {
    let folder = in_memory();
    let (broken, syncs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (breaks, counts) = (broken.clone(), syncs.clone());
    let sync = move |file: &File| {
        counts.fetch_add(1, Ordering::SeqCst);
        if breaks.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(5)) } else { file.sync_data() }
    };
    let (log, _) = Log::open_with(&settings(folder.path()), Box::new(sync)).unwrap();
    let running = begin(&log).await;
    broken.store(true, Ordering::SeqCst);
    assert_eq!(log.begin(of(TurnId::fresh())).await.err(), Some(Refused::Sealed));
    assert!(log.is_sealed());
    // The disk is well again, and is not asked: what it lost before it would not say now.
    broken.store(false, Ordering::SeqCst);
    let asked = syncs.load(Ordering::SeqCst);
    assert_eq!(log.begin(of(TurnId::fresh())).await.err(), Some(Refused::Sealed));
    complete(running);
    assert_eq!(log.flush().await, Err(Refused::Sealed));
    assert_eq!((syncs.load(Ordering::SeqCst), log.durable()), (asked, 2));
    drop(log);
    let left = copied(folder.path());
    let (_, recovered) = open(left.path());
    assert!((1..=2).contains(&recovered.crashed), "{recovered:?}");
    assert_eq!(good(left.path()).open, []);
}

#[tokio::test]
async fn the_oldest_go_when_the_cap_is_reached_but_nothing_with_an_open_turn() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    while segments(folder.path())[0] == 1 {
        whole_turn(&log).await;
    }
    log.flush().await.unwrap();
    let judged = good(folder.path());
    assert!(judged.first > 1, "{judged:?}");
    let taken = || segments(folder.path()).iter().map(|number| fs::metadata(file(folder.path(), *number)).unwrap().len()).sum::<u64>();
    assert!(taken() <= Settings::LEAST_CAP);

    // An open turn holds its segment and all later ones: at last new turns are refused, and it can still end.
    let running = begin(&log).await;
    let refused = loop {
        match log.begin(of(TurnId::fresh())).await {
            Ok(account) => complete(account),
            Err(refused) => break refused,
        }
    };
    assert_eq!(refused, Refused::Full);
    assert!(taken() <= Settings::LEAST_CAP);
    complete(running);
    whole_turn(&log).await;
    log.flush().await.unwrap();
    assert_eq!(good(folder.path()).open, []);
    drop(log);
    let (_, recovered) = open(folder.path());
    assert_eq!((recovered.crashed, recovered.torn_bytes), (0, 0));
}

#[tokio::test]
async fn as_many_turns_as_the_log_takes_can_all_end() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    let mut running = Vec::new();
    let refused = loop {
        match log.begin(of(TurnId::fresh())).await {
            Ok(account) => running.push(account),
            Err(refused) => break refused,
        }
    };
    assert_eq!(refused, Refused::Full);
    let count = running.len() as u64;
    for account in running {
        account.close(&Err(Fault::us(headgate_contracts::Code::InternalError).into()), Finish::Stop, Progress::default());
    }
    log.flush().await.unwrap();
    let judged = good(folder.path());
    assert_eq!((judged.begun, judged.ended, judged.open.len()), (count, count, 0));
    assert!(count > 500, "{count}");
}

#[tokio::test]
async fn a_disk_that_is_full_refuses_turns_and_loses_no_end() {
    let folder = in_memory();
    let Some(_disk) = SmallDisk::at(folder.path(), 3 << 20) else { return };
    let at = folder.path().join("log");
    let (log, _) = Log::open(&Settings { cap: 64 << 20, ..settings(&at) }).err().map_or_else(
        || unreachable!("a segment of 4 MiB does not fit a disk of 3"),
        |refused| {
            assert!(matches!(refused, Unopened::Unusable { .. }), "{refused}");
            Log::open(&settings(&at)).unwrap()
        },
    );
    let mut running = Vec::new();
    let refused = loop {
        match log.begin(of(TurnId::fresh())).await {
            Ok(account) => running.push(account),
            Err(refused) => break refused,
        }
    };
    assert_eq!((refused, log.is_sealed()), (Refused::Full, false));
    // Whatever else fills what is left of the disk, the ends have their room.
    let mut hog = File::create(folder.path().join("hog")).unwrap();
    while io::Write::write(&mut hog, &[1; 4096]).is_ok() {}
    let count = running.len() as u64;
    running.into_iter().for_each(complete);
    log.flush().await.unwrap();
    let judged = good(&at);
    assert_eq!((judged.begun, judged.ended, judged.open.len()), (count, count, 0));
}

/// A disk of its own, in memory: needs root.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn at(folder: &Path, bytes: u64) -> Option<SmallDisk> {
        let mounted =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(folder).output();
        if mounted.is_ok_and(|mount| mount.status.success()) {
            return Some(SmallDisk(folder.to_owned()));
        }
        let missing = Missing { what: "the right to mount a tmpfs".to_owned(), how: "run it as root".to_owned() };
        missing.skip("a_disk_that_is_full_refuses_turns_and_loses_no_end");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the writer may still hold its files.
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test]
async fn a_reader_follows_a_log_across_its_segments_while_it_is_written() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    let mut follow = Follow::open(folder.path()).unwrap();
    assert_eq!(follow.next_entry().unwrap(), None);
    let mut next = 1;
    while segments(folder.path()).last() < Some(&4) {
        whole_turn(&log).await;
        log.flush().await.unwrap();
        while let Some(entry) = follow.next_entry().unwrap() {
            assert_eq!(entry.number, next);
            next += 1;
        }
        assert_eq!(next, log.durable() + 1);
    }
}

#[test]
fn a_second_writer_is_refused() {
    let folder = in_memory();
    let _first = open(folder.path());
    let refused = Log::open(&settings(folder.path())).unwrap_err();
    assert!(std::error::Error::source(&refused).unwrap().to_string().contains("another process"), "{refused}");
}

/// A segment of these records, numbered from `first`.
fn forged(folder: &Path, first: u64, records: &[(Part, TurnId, Kind)]) {
    let mut bytes = Vec::new();
    for (number, (part, turn, kind)) in (first..).zip(records) {
        let event = serde_json::to_vec(&Event::unknown(*turn).followed_by(*kind, SystemTime::now(), ())).unwrap();
        Record { number, durable: number - 1, part: *part, turn: *turn, event: &event }.write(&mut bytes);
    }
    fs::write(file(folder, 1), bytes).unwrap();
}

#[test]
fn the_judge_objects_to_whatever_must_not_be() {
    use Part::{After, Begins, Ends, Settles, Within};
    let (one, two) = (TurnId::fresh(), TurnId::fresh());
    let begin = (Begins, one, Kind::Accepted);
    let (end, verdict, delivery) = ((Ends, one, Kind::Completed), (After, one, Kind::OutputVerdict), (Settles, one, Kind::Delivery));
    /// Records, the number of the first, and what is objected to.
    type Case<'a> = (&'a [(Part, TurnId, Kind)], u64, &'a str);
    let cases: [Case<'_>; 19] = [
        (&[begin, (Within, one, Kind::InputVerdict), (Ends, one, Kind::Completed)], 1, ""),
        (&[begin, (Ends, one, Kind::Completed), (Ends, one, Kind::Failed)], 1, "ends a second time"),
        (&[begin, begin], 1, "begins a second time"),
        (&[begin, (Ends, two, Kind::Completed)], 1, "has not begun"),
        (&[begin, (Ends, one, Kind::Denied), (Within, one, Kind::InputVerdict)], 1, "has ended before"),
        (&[begin, (Within, one, Kind::InputVerdict), (Within, one, Kind::InputVerdict)], 1, "out of order within its turn"),
        (&[begin, (Within, one, Kind::Completed)], 1, "another part in its turn"),
        (&[begin, end, verdict, delivery], 1, ""),
        (&[begin, end, delivery], 1, ""),
        (&[begin, end, delivery, delivery], 1, "settled before"),
        (&[begin, end, delivery, verdict], 1, "settled before"),
        (&[begin, end, verdict, verdict], 1, "out of order within its turn"),
        (&[begin, delivery], 1, "has not ended"),
        (&[begin, verdict], 1, "has not ended"),
        (&[begin, end, (After, one, Kind::Delivery)], 1, "another part in its turn"),
        // Only a prompt that was refused ends with nothing owed.
        (&[begin, end, (Settles, one, Kind::Denied)], 1, "out of order within its turn"),
        (&[end, verdict, delivery, delivery], 40, "settled before"),
        // The oldest were let go: an end may stand alone, but only once.
        (&[(Ends, two, Kind::Completed), begin], 40, ""),
        (&[(Ends, two, Kind::Completed), (Ends, two, Kind::Completed)], 40, "ends a second time"),
    ];
    for (records, first, objection) in cases {
        let folder = in_memory();
        forged(folder.path(), first, records);
        let judged = verify(folder.path()).unwrap();
        assert_eq!(judged.is_good(), objection.is_empty(), "{objection}: {judged:?}");
        assert!(judged.violations.iter().all(|violation| violation.to_string().contains(objection)), "{objection}: {judged:?}");
    }
}

pub(super) fn told(outcome: Delivered) -> Told {
    let report = DeliveryReport {
        tenant: "acme".parse().unwrap(),
        session_id: "s1".parse().unwrap(),
        outcome,
        code: None,
        last_seq: Some(3),
        text_bytes: 12,
        verdict: None,
    };
    Told::of(&report, None)
}

async fn tell(log: &Log, turn: TurnId) -> Result<Heard, Untold> {
    log.tell(turn, "acme/s1".into(), told(Delivered::Delivered)).await
}

fn last(folder: &Path) -> serde_json::Value {
    let mut log = Follow::open(folder).unwrap();
    let last = std::iter::from_fn(|| log.next_entry().unwrap()).last().unwrap();
    serde_json::from_slice(&last.event).unwrap()
}

#[tokio::test]
async fn what_the_user_got_is_kept_once_and_only_for_the_turn_and_session_that_it_is_about() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    let turn = TurnId::fresh();
    assert_eq!(tell(&log, turn).await, Err(Untold::Unknown));
    let account = log.begin(of(turn)).await.unwrap();
    assert_eq!(tell(&log, turn).await, Err(Untold::Open));
    complete(account);
    let foreign = log.tell(turn, "other/s1".into(), told(Delivered::Cut)).await;
    assert_eq!(foreign, Err(Untold::Unknown), "another tenant's turn is not there");
    assert_eq!(good(folder.path()).owed, [turn]);
    assert_eq!(tell(&log, turn).await, Ok(Heard::Now));
    assert_eq!(log.tell(turn, "acme/s1".into(), told(Delivered::Cut)).await, Ok(Heard::Again), "the first word counts");
    let event = last(folder.path());
    assert_eq!((event["type"].as_str(), event["data"]["outcome"].as_str()), (Some("delivery.v1"), Some("delivered")));
    let judged = good(folder.path());
    assert_eq!((judged.records, judged.settled, judged.untold, judged.owed.len()), (4, 1, 0, 0));
    drop(log);
    let (log, _) = open(folder.path());
    assert_eq!(tell(&log, turn).await, Ok(Heard::Again), "across a start, too");
}

#[tokio::test]
async fn a_turn_of_which_no_gateway_says_what_the_user_got_is_unknown_in_time_and_stays_so() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    let (silent, open_still) = (TurnId::fresh(), TurnId::fresh());
    complete(log.begin(of(silent)).await.unwrap());
    let running = log.begin(of(open_still)).await.unwrap();
    log.sweep(Duration::from_secs(3600));
    log.flush().await.unwrap();
    assert_eq!(good(folder.path()).owed, [silent], "there is time");
    log.sweep(Duration::ZERO);
    log.flush().await.unwrap();
    let judged = good(folder.path());
    assert_eq!((judged.settled, judged.untold, judged.open), (1, 1, vec![open_still]));
    assert_eq!(tell(&log, silent).await, Err(Untold::Late));
    complete(running);
    log.flush().await.unwrap();
    drop(log);
    let (log, _) = open(folder.path());
    assert_eq!(tell(&log, silent).await, Err(Untold::Late));
    assert_eq!(tell(&log, open_still).await, Ok(Heard::Now), "what was owed before a start can be told after it");
}

#[tokio::test]
async fn a_turn_that_a_crash_cut_can_still_be_told_of() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    let turn = TurnId::fresh();
    let _running = log.begin(of(turn)).await.unwrap();
    let left = copied(folder.path());
    let (again, recovered) = open(left.path());
    assert_eq!((recovered.crashed, good(left.path()).owed), (1, vec![turn]));
    assert_eq!(tell(&again, turn).await, Ok(Heard::Now));
    assert_eq!(good(left.path()).settled, 1);
}

pub(super) fn denial(turn: TurnId) -> Denial {
    let issuer = headgate_policy::Issuer {
        iss: "headgate".into(),
        pol: headgate_policy::Policy { id: "default".into(), ver: "7".into() },
        con: headgate_policy::Digest::of(b""),
    };
    let facts = headgate_policy::Facts {
        tid: "acme",
        sub: "u1",
        sid: "s1",
        turn: &turn.to_string(),
        dec: headgate_policy::Decision::Deny,
        cat: &["hate"],
        trc: None,
    };
    let claims = issuer.dispatch(&facts, "POST", "/", headgate_policy::Digest::of(b""), 0).unwrap();
    let report = DenialReport {
        tenant: "acme".parse().unwrap(),
        session_id: "s1".parse().unwrap(),
        subject: "u1".parse().unwrap(),
        code: "policy_denied".into(),
    };
    Denial::of(turn, &report, &claims, &headgate_contracts::Trace::fresh())
}

#[tokio::test]
async fn a_prompt_that_was_refused_is_kept_once_and_owes_nothing() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    let (turn, taken) = (TurnId::fresh(), TurnId::fresh());
    assert_eq!(log.deny(denial(turn)).await, Ok(Heard::Now));
    assert_eq!(log.deny(denial(turn)).await, Ok(Heard::Again));
    assert_eq!(log.begin(of(turn)).await.err(), Some(Refused::Known), "it cannot become a turn");
    assert_eq!(tell(&log, turn).await, Err(Untold::Late));
    complete(log.begin(of(taken)).await.unwrap());
    assert_eq!(log.deny(denial(taken)).await, Err(Untold::Late));
    let event = last_of(folder.path(), turn);
    assert_eq!((event["type"].as_str(), event["partitionkey"].as_str()), (Some("turn.denied.v1"), Some("acme/s1")));
    assert_eq!(event["data"]["categories"][0], "hate");
    let judged = good(folder.path());
    assert_eq!((judged.refused, judged.begun, judged.open.len(), judged.owed.len()), (1, 1, 0, 1));
    drop(log);
    let (log, recovered) = open(folder.path());
    assert_eq!((recovered.crashed, log.deny(denial(turn)).await), (0, Ok(Heard::Again)));
}

fn last_of(folder: &Path, turn: TurnId) -> serde_json::Value {
    let mut log = Follow::open(folder).unwrap();
    let of_turn = std::iter::from_fn(|| log.next_entry().unwrap()).filter(|entry| entry.turn == turn);
    serde_json::from_slice(&of_turn.last().unwrap().event).unwrap()
}

#[tokio::test]
async fn who_asks_stands_in_no_event_and_has_one_name_across_starts() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    whole_turn(&log).await;
    log.deny(denial(TurnId::fresh())).await.unwrap();
    drop(log);
    let (log, _) = open(folder.path());
    whole_turn(&log).await;
    log.flush().await.unwrap();
    let mut events = Follow::open(folder.path()).unwrap();
    let mut subjects = Vec::new();
    while let Some(entry) = events.next_entry().unwrap() {
        let event: serde_json::Value = serde_json::from_slice(&entry.event).unwrap();
        assert!(!event.to_string().contains("\"u1\""), "{event}");
        subjects.extend(event["data"].get("subject").map(|name| name.as_str().unwrap().to_owned()));
    }
    assert!(subjects.len() == 3 && subjects[0].len() == 22 && subjects.iter().all(|name| *name == subjects[0]), "{subjects:?}");
    // With the key nobody leads from the names to who asked any more, and nobody gets an old name again.
    drop(log);
    fs::remove_file(folder.path().join("names.key")).unwrap();
    let (log, _) = open(folder.path());
    let turn = TurnId::fresh();
    complete(log.begin(of(turn)).await.unwrap());
    log.flush().await.unwrap();
    let mut events = Follow::open(folder.path()).unwrap();
    let last = std::iter::from_fn(|| events.next_entry().unwrap()).find(|entry| entry.turn == turn).unwrap();
    assert!(!String::from_utf8(last.event).unwrap().contains(&subjects[0]));
}

#[tokio::test]
async fn a_refused_prompt_torn_after_its_verdict_is_refused_by_the_next_start() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    let turn = TurnId::fresh();
    log.deny(denial(turn)).await.unwrap();
    let mut bytes = fs::read(file(folder.path(), 1)).unwrap();
    drop(log);
    bytes.truncate(record_bytes(Entry::at(&bytes, 0).event.len()) + 20);
    let torn = in_memory();
    fs::write(file(torn.path(), 1), bytes).unwrap();
    let (log, _) = open(torn.path());
    let judged = good(torn.path());
    assert_eq!((judged.refused, judged.crashed, judged.open.len()), (1, 0, 0));
    assert_eq!(log.deny(denial(turn)).await, Ok(Heard::Again));
}

#[tokio::test]
async fn before_a_turn_is_refused_for_room_the_oldest_word_is_not_waited_for() {
    let folder = in_memory();
    let (log, _) = open(folder.path());
    // Thrice what the cap has room to wait for; no gateway says a word.
    for _ in 0..3000 {
        whole_turn(&log).await;
    }
    log.flush().await.unwrap();
    let judged = good(folder.path());
    assert!(judged.untold > 0 && !judged.owed.is_empty(), "{judged:?}");
}

/// What an acknowledged beginning costs: `cargo test -p headgate-orchestrator --lib -- --ignored --nocapture acknowledged`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
#[allow(clippy::print_stdout, reason = "the figures are what it is for")]
async fn what_an_acknowledged_beginning_costs() {
    for at_once in [1, 16, 128] {
        let folder = tempfile::tempdir_in(".").unwrap();
        let (log, _) = Log::open(&Settings { cap: 1 << 30, ..settings(folder.path()) }).unwrap();
        let log = Arc::new(log);
        let begun = std::time::Instant::now();
        let tasks = (0..at_once).map(|_| {
            let log = log.clone();
            tokio::spawn(async move {
                let mut took = Vec::new();
                for _ in 0..(20_000 / at_once).min(4000) {
                    let begun = std::time::Instant::now();
                    let account = begin(&log).await;
                    took.push(begun.elapsed());
                    complete(account);
                }
                took
            })
        });
        let tasks: Vec<_> = tasks.collect();
        let mut took: Vec<Duration> = Vec::new();
        for task in tasks {
            took.extend(task.await.unwrap());
        }
        took.sort_unstable();
        let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize];
        let rate = took.len() as f64 / begun.elapsed().as_secs_f64();
        println!("{at_once} at once: p50 {:?}, p99 {:?}, max {:?}, {rate:.0} turns/s", at(0.5), at(0.99), at(1.0));
    }
}
