//! Clients and a paced model server in one thread, so that they share a clock and one core.
//!
//! The model server sends by a timetable that no answer can delay (open loop), and every latency is told twice: from when an
//! event was due, and from when it was really sent. The difference is the generator's own lateness, never the peer's credit.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use memchr::memmem;
use rustix::{
    event::{Timespec, epoll},
    net::{self, AddressFamily, SocketFlags, SocketType, ipproto, sockopt},
};

use crate::{
    reply::{Over, Reply},
    words::{self, Word},
    workload::{Clients, Front, Workload, fill},
};

/// A response or a request is given up beyond this.
const MOST_PENDING: usize = 64 << 20;
const LISTENER: u64 = u64::MAX;
/// How long streams may take to open, and to end.
const PATIENCE: Duration = Duration::from_secs(20);
const READ: usize = 64 << 10;

/// A model server's socket, bound: its address is known before peers are configured.
pub(crate) struct Model {
    listener: TcpListener,
    pub(crate) address: SocketAddr,
}

impl Model {
    pub(crate) fn bind() -> io::Result<Model> {
        let socket =
            net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, Some(ipproto::TCP))?;
        net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
        // The standard library's backlog of 128 is too short for thousands of streams that open in a second.
        net::listen(&socket, 4096)?;
        let listener = TcpListener::from(socket);
        let address = listener.local_addr()?;
        Ok(Model { listener, address })
    }
}

/// What is asked of the peer, and when.
pub(crate) struct Order<'a> {
    pub(crate) work: &'a Workload,
    /// Where clients connect.
    pub(crate) peer: SocketAddr,
    /// What stands before `/v1/...`.
    pub(crate) prefix: &'a str,
    /// Their bearer token.
    pub(crate) key: &'a str,
    /// How long is measured.
    pub(crate) window: Duration,
}

/// A moment of a run at which the peer is looked at from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// Before the first connection.
    Empty,
    /// All streams are open; the window begins.
    Begin,
    /// The window has ended.
    End,
}

/// What was seen.
pub(crate) struct Seen {
    /// Streams or turns that ended as they should.
    pub(crate) turns: u64,
    /// Events heard within the window.
    pub(crate) events: u64,
    /// Requests answered within the window.
    pub(crate) requests: u64,
    /// Events the model sent in the whole run, and those that were heard.
    pub(crate) sent: u64,
    pub(crate) heard: u64,
    /// Streams open at the begin of the window.
    pub(crate) open: usize,
    pub(crate) window: Duration,
    /// From when an event, or a request, was due, until it was heard, or answered; in ns.
    pub(crate) due: Histogram<u64>,
    /// From when an event was sent until it was heard, in ns.
    pub(crate) sent_to_heard: Histogram<u64>,
    /// From a client's leaving until the model saw its connection closed, in ns.
    pub(crate) leaving: Histogram<u64>,
    /// Clients that left.
    pub(crate) left: u64,
    /// The most requests that waited for a free connection.
    pub(crate) queued: usize,
    /// What went wrong: the first few, and how many in all.
    pub(crate) faults: Vec<String>,
    pub(crate) faults_total: u64,
}

impl Seen {
    fn new() -> Seen {
        let empty = || Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds that hdrhistogram allows");
        Seen {
            turns: 0,
            events: 0,
            requests: 0,
            sent: 0,
            heard: 0,
            open: 0,
            window: Duration::ZERO,
            due: empty(),
            sent_to_heard: empty(),
            leaving: empty(),
            left: 0,
            queued: 0,
            faults: Vec::new(),
            faults_total: 0,
        }
    }

    pub(crate) fn fault(&mut self, what: impl Into<String>) {
        self.faults_total += 1;
        if self.faults.len() < 8 {
            self.faults.push(what.into());
        }
    }
}

/// A socket's place and the number of sockets that had it before: an event that comes late cannot meet its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Token {
    place: u32,
    age: u32,
}

impl Token {
    fn bits(self) -> u64 {
        u64::from(self.age) << 32 | u64::from(self.place)
    }
    fn of(bits: u64) -> Token {
        Token { place: bits as u32, age: (bits >> 32) as u32 }
    }
}

struct Socket {
    stream: TcpStream,
    /// What the kernel would not take yet.
    pending: Vec<u8>,
    side: Side,
}

enum Side {
    /// A client's connection: that of the first of its slots, and of those after it that share it. `waiting`: frames for a
    /// WebSocket that is not one yet.
    Client { slot: u32, reply: Box<Reply>, waiting: Vec<u8> },
    /// A connection to the model server.
    Model { request: Vec<u8>, slot: Option<u32>, speaks: Speech },
}

/// How the model is spoken to on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Speech {
    #[default]
    Requests,
    /// It is a WebSocket: the peer passes on what clients say.
    Frames,
}

/// One stream: the client's end, the model's end, and what is between them.
#[derive(Default)]
struct Slot {
    client: Option<Token>,
    model: Option<Token>,
    turn: u32,
    /// Events of this turn that were sent, and heard.
    sent: u32,
    heard: u32,
    /// When the first write of this turn was due.
    origin: u64,
    /// When its request was due.
    asked: u64,
    /// When events that are under way were sent.
    under_way: VecDeque<u64>,
    /// When its client left, for as long as the model has not noticed.
    left: Option<u64>,
    is_open: bool,
    speaks: Speech,
    /// The model says it all at once, or piece by piece.
    wants_stream: bool,
    wants_usage: bool,
}

struct Engine<'a> {
    order: &'a Order<'a>,
    epoll: OwnedFd,
    listener: &'a TcpListener,
    clock: Instant,
    sockets: Vec<Option<Socket>>,
    ages: Vec<u32>,
    free: Vec<u32>,
    slots: Vec<Slot>,
    /// Writes of the model that are due: when, which stream, which turn.
    due: BinaryHeap<Reverse<(u64, u32, u32)>>,
    /// Slots that wait for a request to be due.
    idle: Vec<u32>,
    /// Requests that are due and found no connection free: when they were.
    waiting: VecDeque<u64>,
    /// What the model says in one write, as server-sent events and as frames.
    events: Burst,
    frames: Burst,
    buffer: Vec<u8>,
    begin: u64,
    end: u64,
    seen: Seen,
}

/// Runs one workload against one peer. `look` is called at each [`Mark`].
pub(crate) fn run(model: &Model, order: &Order<'_>, look: &mut dyn FnMut(Mark) -> io::Result<()>) -> io::Result<Seen> {
    let work = order.work;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &model.listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
    let mut engine = Engine {
        order,
        epoll,
        listener: &model.listener,
        clock: Instant::now(),
        sockets: Vec::new(),
        ages: Vec::new(),
        free: Vec::new(),
        slots: (0..work.streams).map(|_| Slot::default()).collect(),
        due: BinaryHeap::new(),
        idle: Vec::new(),
        waiting: VecDeque::new(),
        events: Burst::of_events(work),
        frames: Burst::of_frames(work),
        buffer: vec![0; READ],
        begin: u64::MAX,
        end: u64::MAX,
        seen: Seen::new(),
    };
    look(Mark::Empty)?;
    engine.open_all()?;
    look(Mark::Begin)?;
    engine.measure()?;
    look(Mark::End)?;
    engine.finish()?;
    Ok(engine.seen)
}

impl Engine<'_> {
    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    fn per_socket(&self) -> u32 {
        self.order.work.per_socket as u32
    }

    /// Opens all streams, 2,000 a second, and waits until each has been answered.
    fn open_all(&mut self) -> io::Result<()> {
        let asks_itself = !matches!(self.order.work.clients, Clients::Rate(_));
        for slot in 0..self.slots.len() as u32 {
            while self.now() < u64::from(slot) * 500_000 {
                self.step(self.now() + 500_000)?;
            }
            match slot % self.per_socket() {
                0 => self.connect(slot)?,
                place => self.slots[slot as usize].client = self.slots[(slot - place) as usize].client,
            }
            if asks_itself {
                self.ask(slot, self.now())?;
            } else {
                self.idle.push(slot);
            }
        }
        let until = self.now() + PATIENCE.as_nanos() as u64;
        let wanted = if asks_itself { self.slots.len() } else { 0 };
        while self.open_streams() < wanted && self.now() < until && self.seen.faults_total == 0 {
            self.step(self.now() + 5_000_000)?;
        }
        // What the opening has stirred up settles.
        let until = self.now() + 300_000_000;
        while self.now() < until {
            self.step(until)?;
        }
        self.seen.open = self.open_streams();
        if self.seen.open < wanted {
            self.seen.fault(format!("only {} of {wanted} streams opened", self.seen.open));
        }
        Ok(())
    }

    /// Streams that say something; of those that ask again and again, the ones that have been answered once.
    fn open_streams(&self) -> usize {
        let again = self.order.work.is_at_most();
        self.slots.iter().filter(|slot| if again { slot.turn > 1 } else { slot.is_open }).count()
    }

    fn measure(&mut self) -> io::Result<()> {
        let begin = self.now();
        self.begin = begin;
        self.end = begin + self.order.window.as_nanos() as u64;
        let (step, asks) = match self.order.work.clients {
            Clients::Stay | Clients::Again => (u64::MAX, false),
            Clients::Rate(rate) => (1_000_000_000 / u64::from(rate.max(1)), true),
            Clients::Leave(every) => (every.as_nanos() as u64, false),
        };
        let (mut next, mut leaver) = (if step == u64::MAX { u64::MAX } else { begin }, 0);
        loop {
            let now = self.now();
            if now >= self.end {
                break;
            }
            while next <= now {
                if asks {
                    match self.idle.pop() {
                        Some(slot) => self.ask(slot, next)?,
                        None => self.waiting.push_back(next),
                    }
                    self.seen.queued = self.seen.queued.max(self.waiting.len());
                } else {
                    self.leave(leaver)?;
                    leaver = (leaver + 1) % self.slots.len() as u32;
                }
                next = next.saturating_add(step);
            }
            self.step(next.min(self.end))?;
        }
        self.seen.window = Duration::from_nanos(self.now() - begin);
        Ok(())
    }

    /// Ends all answers in order, and holds what came against what was sent.
    fn finish(&mut self) -> io::Result<()> {
        self.due.clear();
        for slot in 0..self.slots.len() {
            if self.order.work.writes.is_none() && self.slots[slot].model.is_some() && self.slots[slot].left.is_none() {
                self.end_answer(slot as u32)?;
            }
        }
        let until = self.now() + PATIENCE.as_nanos() as u64;
        while self.slots.iter().any(|slot| slot.is_open || slot.left.is_some()) && self.now() < until {
            self.step(self.now() + 5_000_000)?;
        }
        let unfinished = self.slots.iter().filter(|slot| slot.is_open).count();
        if unfinished > 0 {
            self.seen.fault(format!("{unfinished} answers never ended"));
        }
        let unseen = self.slots.iter().filter(|slot| slot.left.is_some()).count();
        if unseen > 0 {
            self.seen.fault(format!("{unseen} clients left and the model was not told"));
        }
        for socket in self.sockets.drain(..).flatten() {
            // Reset instead of TIME_WAIT: the next run needs the ports.
            sockopt::set_socket_linger(&socket.stream, Some(Duration::ZERO))?;
        }
        Ok(())
    }

    /// Sends what is due, then handles what came, waiting for it at most until `until`.
    fn step(&mut self, until: u64) -> io::Result<()> {
        let mut now = self.now();
        while let Some(&Reverse((due, slot, turn))) = self.due.peek() {
            if due > now {
                break;
            }
            self.due.pop();
            if self.slots.get(slot as usize).is_some_and(|it| it.turn == turn && it.model.is_some() && it.left.is_none()) {
                self.send_burst(slot, due)?;
                now = self.now();
            }
        }
        let until = self.due.peek().map_or(until, |Reverse((due, ..))| until.min(*due));
        let wait = Duration::from_nanos(until.saturating_sub(now));
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        let ready = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok(ready) => ready,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        for event in &events[..ready] {
            match event.data.u64() {
                LISTENER => self.accept()?,
                bits => self.ready(Token::of(bits), event.flags)?,
            }
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    self.keep(stream, Side::Model { request: Vec::new(), slot: None, speaks: Speech::Requests })?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(&mut self, stream: TcpStream, side: Side) -> io::Result<Token> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let place = self.free.pop().unwrap_or_else(|| {
            self.sockets.push(None);
            self.ages.push(0);
            (self.sockets.len() - 1) as u32
        });
        let at = place as usize;
        self.ages[at] = self.ages[at].wrapping_add(1) & 0x7fff_ffff;
        let token = Token { place, age: self.ages[at] };
        epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(token.bits()), epoll::EventFlags::IN | epoll::EventFlags::RDHUP)?;
        self.sockets[at] = Some(Socket { stream, pending: Vec::new(), side });
        Ok(token)
    }

    fn socket(&mut self, token: Token) -> Option<&mut Socket> {
        let at = token.place as usize;
        if self.ages.get(at) != Some(&token.age) { None } else { self.sockets.get_mut(at)?.as_mut() }
    }

    fn close(&mut self, token: Token) -> Option<Socket> {
        self.socket(token)?;
        self.free.push(token.place);
        self.ages[token.place as usize] = (token.age + 1) & 0x7fff_ffff;
        self.sockets[token.place as usize].take()
    }

    fn ready(&mut self, token: Token, flags: epoll::EventFlags) -> io::Result<()> {
        if flags.contains(epoll::EventFlags::OUT) {
            self.flush(token)?;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let done = self.read(token, &mut buffer);
        self.buffer = buffer;
        done
    }

    fn read(&mut self, token: Token, buffer: &mut [u8]) -> io::Result<()> {
        let Some(socket) = self.socket(token) else { return Ok(()) };
        let read = match socket.stream.read(buffer) {
            Ok(n) => n,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return Ok(()),
            // A reset is a close.
            Err(_) => 0,
        };
        let is_client = matches!(socket.side, Side::Client { .. });
        let now = self.now();
        match (is_client, read) {
            (true, 0) => self.client_closed(token),
            (true, n) => self.client_heard(token, &buffer[..n], now)?,
            (false, 0) => self.model_left(token, now),
            (false, n) => self.model_heard(token, &buffer[..n], now)?,
        }
        Ok(())
    }

    /// Writes, and keeps what the kernel does not take.
    fn write(&mut self, token: Token, bytes: &[u8]) -> io::Result<()> {
        let Some(socket) = self.socket(token) else { return Ok(()) };
        let mut taken = 0;
        if socket.pending.is_empty() {
            taken = match socket.stream.write(bytes) {
                Ok(n) => n,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                // It is closed; reading says so too.
                Err(_) => return Ok(()),
            };
            if taken == bytes.len() {
                return Ok(());
            }
        }
        if socket.pending.len() + bytes.len() > MOST_PENDING {
            return Err(io::Error::other("the peer takes nothing more"));
        }
        let was_empty = socket.pending.is_empty();
        socket.pending.extend_from_slice(&bytes[taken..]);
        if was_empty { self.watch(token, true) } else { Ok(()) }
    }

    fn flush(&mut self, token: Token) -> io::Result<()> {
        let Some(socket) = self.socket(token) else { return Ok(()) };
        match socket.stream.write(&socket.pending) {
            Ok(n) => {
                socket.pending.drain(..n);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => socket.pending.clear(),
        }
        if socket.pending.is_empty() { self.watch(token, false) } else { Ok(()) }
    }

    fn watch(&mut self, token: Token, writable: bool) -> io::Result<()> {
        let mut flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        flags.set(epoll::EventFlags::OUT, writable);
        let Some(Some(socket)) = self.sockets.get(token.place as usize) else { return Ok(()) };
        Ok(epoll::modify(&self.epoll, &socket.stream, epoll::EventData::new_u64(token.bits()), flags)?)
    }

    // Clients.

    fn connect(&mut self, slot: u32) -> io::Result<()> {
        let stream = TcpStream::connect_timeout(&self.order.peer, Duration::from_secs(5))?;
        let reply = Box::new(Reply::new(self.order.work.front));
        let token = self.keep(stream, Side::Client { slot, reply, waiting: Vec::new() })?;
        self.slots[slot as usize].client = Some(token);
        if self.order.work.front == Front::WebSocket { self.write(token, &upgrade(self.order)) } else { Ok(()) }
    }

    /// Sends the next request of a slot; it was due at `due`.
    fn ask(&mut self, slot: u32, due: u64) -> io::Result<()> {
        let it = &mut self.slots[slot as usize];
        it.turn = (it.turn + 1) % words::EVENTS;
        // A stream is open once something was heard of it; what ends by itself as soon as it is asked for.
        (it.sent, it.heard, it.asked, it.model, it.is_open) = (0, 0, due, None, self.order.work.writes.is_some());
        it.under_way.clear();
        let (client, turn) = (it.client, it.turn);
        let request = request(self.order, Word { stream: slot as u16, index: turn });
        let Some(token) = client else { return Ok(()) };
        let front = self.order.work.front;
        if let Some(Socket { side: Side::Client { reply, waiting, .. }, .. }) = self.socket(token)
            && front == Front::WebSocket
            && !reply.is_upgraded()
        {
            waiting.extend_from_slice(&request);
            return Ok(());
        }
        self.write(token, &request)
    }

    fn client_heard(&mut self, token: Token, bytes: &[u8], now: u64) -> io::Result<()> {
        let Engine { sockets, slots, seen, begin, end, order, .. } = self;
        let Some(Some(Socket { side: Side::Client { slot, reply, waiting }, .. })) = sockets.get_mut(token.place as usize) else {
            return Ok(());
        };
        let (first, work) = (*slot as usize, order.work);
        let in_window = (*begin..*end).contains(&now);
        let mut out_of_order = None;
        let read = reply.push(bytes, &mut |word| {
            let stream = usize::from(word.stream);
            let it = match slots.get_mut(stream) {
                Some(it) if (first..first + work.per_socket).contains(&stream) && it.heard == word.index => it,
                _ => {
                    out_of_order.get_or_insert(word);
                    return;
                }
            };
            seen.heard += 1;
            seen.events += u64::from(in_window);
            let due = it.origin + work.every.as_nanos() as u64 * u64::from(it.heard / work.burst as u32);
            let sent = it.under_way.pop_front().unwrap_or(now);
            // By when it was due, not by when it came: what came too late must count.
            if (*begin..*end).contains(&due) && !work.is_by_request() {
                seen.due.saturating_record(now.saturating_sub(due).max(1));
                seen.sent_to_heard.saturating_record(now.saturating_sub(sent).max(1));
            }
            it.heard += 1;
            it.is_open = true;
        });
        let (pings, over) = (std::mem::take(&mut reply.pings), std::mem::take(&mut reply.over));
        let waiting = if reply.is_upgraded() { std::mem::take(waiting) } else { Vec::new() };
        if let Some(Word { stream, index }) = out_of_order {
            let due = slots.get(usize::from(stream)).map_or(0, |it| it.heard);
            seen.fault(format!("the client of stream {first} heard event {index} of stream {stream}, of which {due} was due"));
        }
        if let Err(wrong) = read {
            seen.fault(format!("stream {first}: {wrong}"));
            for it in slots.iter_mut().skip(first).take(work.per_socket) {
                (it.is_open, it.client) = (false, None);
            }
            self.close(token);
            return Ok(());
        }
        for it in over {
            self.ended(first, it, now)?;
        }
        if !waiting.is_empty() {
            self.write(token, &waiting)?;
        }
        for ping in pings {
            self.write(token, &frame(0x8a, &ping, Some(MASK)))?;
        }
        Ok(())
    }

    /// An answer is complete, on the connection of this slot.
    fn ended(&mut self, first: usize, over: Over, now: u64) -> io::Result<()> {
        let work = self.order.work;
        // Who shares no connection is known without a word.
        let Some(slot) = over.stream.map(usize::from).or((work.per_socket == 1).then_some(first)) else {
            self.seen.fault("an answer ended of which no word was heard");
            return Ok(());
        };
        let in_window = (self.begin..self.end).contains(&now);
        let (seen, it) = (&mut self.seen, &mut self.slots[slot]);
        let heard_all = it.heard == it.sent && over.text_bytes == u64::from(it.sent) * work.text as u64;
        if !over.ended {
            seen.fault(format!("the answer of stream {slot} stopped without an end"));
        } else if !heard_all {
            seen.fault(format!(
                "stream {slot} heard {} events and {} bytes of text where {} events were sent",
                it.heard, over.text_bytes, it.sent
            ));
        } else {
            seen.turns += 1;
            seen.requests += u64::from(in_window);
        }
        if work.is_by_request() && (self.begin..self.end).contains(&it.asked) {
            seen.due.saturating_record(now.saturating_sub(it.asked).max(1));
        }
        it.is_open = false;
        it.model = None;
        self.answered(slot as u32, now)
    }

    /// A turn is over: perhaps the next one is asked for.
    fn answered(&mut self, slot: u32, now: u64) -> io::Result<()> {
        match self.order.work.clients {
            Clients::Again if now < self.end => self.ask(slot, now),
            Clients::Rate(_) => match self.waiting.pop_front() {
                Some(due) => self.ask(slot, due),
                None => {
                    self.idle.push(slot);
                    Ok(())
                }
            },
            Clients::Again | Clients::Stay | Clients::Leave(_) => Ok(()),
        }
    }

    fn client_closed(&mut self, token: Token) {
        let Some(Socket { side: Side::Client { slot, reply, .. }, .. }) = self.close(token) else { return };
        let per_socket = self.order.work.per_socket;
        let mut was_open = !reply.is_between();
        for it in self.slots.iter_mut().skip(slot as usize).take(per_socket) {
            was_open |= std::mem::take(&mut it.is_open);
            it.client = None;
        }
        if was_open {
            self.seen.fault(format!("stream {slot} was cut"));
        }
    }

    /// A client goes in the middle of its answer; another takes its place.
    fn leave(&mut self, slot: u32) -> io::Result<()> {
        let it = &mut self.slots[slot as usize];
        if !it.is_open || it.left.is_some() || it.model.is_none() {
            return Ok(());
        }
        let Some(token) = it.client.take() else { return Ok(()) };
        it.is_open = false;
        let now = self.now();
        self.slots[slot as usize].left = Some(now);
        self.seen.left += 1;
        // What was under way is lost with the client; nobody waits for it.
        let it = &self.slots[slot as usize];
        self.seen.sent -= u64::from(it.sent - it.heard);
        drop(self.close(token));
        Ok(())
    }

    // The model server.

    fn model_heard(&mut self, token: Token, bytes: &[u8], now: u64) -> io::Result<()> {
        let Some(Socket { side: Side::Model { request, speaks, .. }, .. }) = self.socket(token) else { return Ok(()) };
        request.extend_from_slice(bytes);
        if *speaks == Speech::Requests {
            let Some(end) = memmem::find(request, b"\r\n\r\n") else { return Ok(()) };
            let head = String::from_utf8_lossy(&request[..end]).into_owned();
            let value = |name: &str| {
                let value =
                    |line: &'_ str| line.split_once(':').filter(|it| it.0.eq_ignore_ascii_case(name)).map(|it| it.1.trim().to_owned());
                head.lines().find_map(value)
            };
            if head.starts_with("GET /v1/models") {
                // AI gateways look around before they are asked for anything.
                request.clear();
                return self.write(token, MODELS);
            }
            if value("upgrade").is_none_or(|protocol| !protocol.eq_ignore_ascii_case("websocket")) {
                let length = value("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
                let Some(body) = request.get(end + 4..end + 4 + length) else { return Ok(()) };
                let body = body.to_vec();
                request.clear();
                return self.asked(token, &body, Speech::Requests, now);
            }
            request.drain(..end + 4);
            *speaks = Speech::Frames;
            self.write(token, UPGRADED)?;
        }
        loop {
            let Some(Socket { side: Side::Model { request, .. }, .. }) = self.socket(token) else { return Ok(()) };
            let Some((payload, used)) = unmasked(request) else { return Ok(()) };
            request.drain(..used);
            self.asked(token, &payload, Speech::Frames, now)?;
        }
    }

    /// The model was asked for something.
    fn asked(&mut self, token: Token, body: &[u8], speaks: Speech, now: u64) -> io::Result<()> {
        let Engine { sockets, slots, seen, .. } = self;
        let Some(Some(Socket { side: Side::Model { slot, .. }, .. })) = sockets.get_mut(token.place as usize) else { return Ok(()) };
        let wants_stream = speaks == Speech::Frames || memmem::find(body, b"\"stream\":true").is_some();
        let wants_usage = memmem::find(body, b"\"include_usage\":true").is_some();
        let Some(word) = Word::find(body) else {
            seen.fault("the model was sent a request that nobody made");
            return self.write(token, b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n");
        };
        *slot = Some(u32::from(word.stream));
        let Some(it) = slots.get_mut(usize::from(word.stream)) else { return Ok(()) };
        if it.turn != word.index {
            seen.fault(format!("the model was asked for turn {} of stream {} when {} was due", word.index, word.stream, it.turn));
            return Ok(());
        }
        it.model = Some(token);
        (it.speaks, it.wants_stream, it.wants_usage) = (speaks, wants_stream, wants_usage);
        let (turn, slot) = (it.turn, u32::from(word.stream));
        if !wants_stream {
            return self.answer_whole(slot, token, now);
        }
        let every = self.order.work.every.as_nanos() as u64;
        if every == 0 {
            self.slots[slot as usize].origin = now;
            return self.send_burst(slot, now);
        }
        // Streams are spread evenly over one interval; idle ones say their one word at once.
        let phase = every / self.slots.len() as u64 * u64::from(slot);
        let first = if self.order.work.is_idle() { now } else { now / every * every + phase };
        let first = if first < now { first + every } else { first };
        self.slots[slot as usize].origin = first;
        self.due.push(Reverse((first, slot, turn)));
        let head = self.stream_head(slot);
        self.write(token, &head)
    }

    /// What stands before a stream's first event.
    fn stream_head(&self, slot: u32) -> Vec<u8> {
        match self.slots[slot as usize].speaks {
            Speech::Requests => STREAM_HEAD.to_vec(),
            Speech::Frames => {
                let open = format!(r#"{{"type":"open","seq":0,"turn_id":"{}","session_id":"s1","model":"demo"}}"#, turn_id(slot));
                frame(0x81, open.as_bytes(), None)
            }
        }
    }

    /// What stands after its last.
    fn stream_end(&self, slot: u32) -> Vec<u8> {
        let it = &self.slots[slot as usize];
        match it.speaks {
            Speech::Requests => stream_end(it.wants_usage),
            Speech::Frames => {
                let done = format!(r#"{{"type":"done","turn_id":"{}","seq":{LAST},"finish":"stop","outcome":"allowed"}}"#, turn_id(slot));
                frame(0x81, done.as_bytes(), None)
            }
        }
    }

    fn answer_whole(&mut self, slot: u32, token: Token, now: u64) -> io::Result<()> {
        let (text, _) = self.order.work.event_text(&Word { stream: slot as u16, index: 0 }.letters());
        let it = &mut self.slots[slot as usize];
        it.origin = now;
        it.sent = 1;
        self.seen.sent += 1;
        let text = String::from_utf8_lossy(&text);
        let body = format!(
            r#"{{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","created":1763712000,"model":"demo","choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}},"logprobs":null,"finish_reason":"stop"}}],"usage":{{"prompt_tokens":256,"completion_tokens":256,"total_tokens":512}}}}"#
        );
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
        self.write(token, (head + &body).as_bytes())
    }

    fn send_burst(&mut self, slot: u32, due: u64) -> io::Result<()> {
        let work = self.order.work;
        let it = &mut self.slots[slot as usize];
        let Some(token) = it.model else { return Ok(()) };
        let speaks = it.speaks;
        let burst = match speaks {
            Speech::Requests => &mut self.events,
            Speech::Frames => &mut self.frames,
        };
        let mut burst = std::mem::replace(burst, Burst { bytes: Vec::new(), ..*burst });
        for event in burst.bytes.chunks_exact_mut(burst.event_len) {
            event[burst.word_at..][..words::LEN].copy_from_slice(&Word { stream: slot as u16, index: it.sent }.letters());
            if let Some(at) = burst.turn_at {
                event[at..][..TURN_ID_LEN].copy_from_slice(turn_id(slot).as_bytes());
            }
            it.sent += 1;
        }
        let (writes, turn) = (it.sent / work.burst as u32, it.turn);
        let now = self.clock.elapsed().as_nanos() as u64;
        self.slots[slot as usize].under_way.extend(std::iter::repeat_n(now, work.burst));
        self.seen.sent += work.burst as u64;
        let is_last = work.writes == Some(writes);
        let written = if work.every.is_zero() {
            // Head, answer and end in one write, as a server does that has it all.
            self.write(token, &[self.stream_head(slot), burst.bytes.clone(), self.stream_end(slot)].concat())
        } else {
            self.write(token, &burst.bytes)
        };
        match speaks {
            Speech::Requests => self.events = burst,
            Speech::Frames => self.frames = burst,
        }
        written?;
        if work.every.is_zero() {
            return Ok(());
        }
        if is_last {
            return self.end_answer(slot);
        }
        self.due.push(Reverse((due + work.every.as_nanos() as u64, slot, turn)));
        Ok(())
    }

    fn end_answer(&mut self, slot: u32) -> io::Result<()> {
        let Some(token) = self.slots[slot as usize].model else { return Ok(()) };
        let end = self.stream_end(slot);
        self.write(token, &end)
    }

    /// A peer closed its connection to the model.
    fn model_left(&mut self, token: Token, now: u64) {
        let Some(Socket { side: Side::Model { slot: Some(slot), speaks, .. }, .. }) = self.close(token) else { return };
        if speaks == Speech::Frames {
            // Clients are cut, and say so.
            self.slots.iter_mut().filter(|it| it.model == Some(token)).for_each(|it| it.model = None);
            return;
        }
        let it = &mut self.slots[slot as usize];
        if it.model != Some(token) {
            return;
        }
        it.model = None;
        if let Some(left) = it.left.take() {
            self.seen.leaving.saturating_record((now - left).max(1));
            if now < self.end {
                // A new client for the place of the one that left.
                if let Err(error) = self.connect(slot).and_then(|()| self.ask(slot, now)) {
                    self.seen.fault(format!("a new client could not connect: {error}"));
                }
            }
        }
    }
}

const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n";

const MODELS: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 57\r\n\r\n{\"object\":\"list\",\"data\":[{\"id\":\"demo\",\"object\":\"model\"}]}";

/// RFC 6455 section 4.2.2, for the one key that clients here send.
const UPGRADED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nsec-websocket-protocol: headgate.v1\r\n\r\n";

/// The sequence number that all events of a model's WebSocket bear: as long as most are, and nobody here looks at it.
const LAST: u32 = 100_000;
const TURN_ID_LEN: usize = 36;

/// How the model's WebSocket names a turn.
fn turn_id(slot: u32) -> String {
    format!("0193a5f0-7e1c-7000-8000-{slot:012x}")
}

/// Events of one write.
struct Burst {
    bytes: Vec<u8>,
    event_len: usize,
    /// Where in an event its word stands, and its turn where it is named.
    word_at: usize,
    turn_at: Option<usize>,
}

impl Burst {
    /// As vLLM writes them, each a chunk of its own.
    fn of_events(work: &Workload) -> Burst {
        let (text, at) = work.event_text(&[b'B'; words::LEN]);
        let before = r#"data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1763712000,"model":"demo","choices":[{"index":0,"delta":{"content":""#;
        let after = "\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
        let size = format!("{:x}\r\n", before.len() + text.len() + after.len());
        let event = [size.as_bytes(), before.as_bytes(), &text, after.as_bytes(), b"\r\n"].concat();
        Burst { bytes: event.repeat(work.burst), event_len: event.len(), word_at: size.len() + before.len() + at, turn_at: None }
    }

    /// As Headgate writes them to a WebSocket.
    fn of_frames(work: &Workload) -> Burst {
        let (text, at) = work.event_text(&[b'B'; words::LEN]);
        let named = r#"{"type":"text","turn_id":""#;
        let before = format!(r#"{named}{}","seq":{LAST},"text":""#, turn_id(0));
        let event = frame(0x81, &[before.as_bytes(), &text, b"\"}"].concat(), None);
        let head = event.len() - before.len() - text.len() - 2;
        let (word_at, turn_at) = (head + before.len() + at, Some(head + named.len()));
        Burst { bytes: event.repeat(work.burst), event_len: event.len(), word_at, turn_at }
    }
}

fn stream_end(usage: bool) -> Vec<u8> {
    let open = r#"data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1763712000,"model":"demo","choices":["#;
    let mut end = format!("{open}{{\"index\":0,\"delta\":{{}},\"logprobs\":null,\"finish_reason\":\"stop\"}}]}}\n\n");
    if usage {
        end += &format!("{open}],\"usage\":{{\"prompt_tokens\":16,\"completion_tokens\":16,\"total_tokens\":32}}}}\n\n");
    }
    end += "data: [DONE]\n\n";
    format!("{:x}\r\n{end}\r\n0\r\n\r\n", end.len()).into_bytes()
}

/// The request of a turn, whose prompt names the stream.
fn request(order: &Order<'_>, word: Word) -> Vec<u8> {
    let mut prompt = b"tell ".to_vec();
    prompt.extend_from_slice(&word.letters());
    fill(&mut prompt, order.work.prompt);
    let prompt = String::from_utf8_lossy(&prompt);
    let messages = format!(r#""messages":[{{"role":"user","content":"{prompt}"}}]"#);
    let (path, body) = match order.work.front {
        Front::OpenAi => ("/v1/chat/completions", format!("{{\"model\":\"demo\",\"stream\":true,{messages}}}")),
        Front::Whole => ("/v1/chat/completions", format!("{{\"model\":\"demo\",{messages}}}")),
        Front::Chat => ("/v1/chat/stream", format!("{{{messages}}}")),
        Front::WebSocket => return frame(0x81, format!("{{\"type\":\"turn\",{messages}}}").as_bytes(), Some(MASK)),
    };
    format!(
        "POST {}{path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        order.prefix,
        order.peer,
        order.key,
        body.len()
    )
    .into_bytes()
}

/// Asks for a WebSocket. The key is fixed: the generator does not check the answer to it, which the gateway's own tests do.
fn upgrade(order: &Order<'_>) -> Vec<u8> {
    format!(
        "GET {}/v1/chat/stream HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: headgate.v1\r\n\r\n",
        order.prefix, order.peer, order.key
    )
    .into_bytes()
}

/// A client's mask. It is fixed: there is no proxy here whose cache it would have to protect.
pub(crate) const MASK: [u8; 4] = [0x5a, 0xa5, 0x3c, 0xc3];

/// A whole frame (RFC 6455 section 5.2): masked from clients, unmasked from servers.
pub(crate) fn frame(first: u8, payload: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    let bit = if mask.is_some() { 0x80 } else { 0 };
    let mut frame = vec![first];
    match u16::try_from(payload.len()) {
        Ok(len) if len < 126 => frame.push(bit | len as u8),
        Ok(len) => {
            frame.push(bit | 126);
            frame.extend_from_slice(&len.to_be_bytes());
        }
        Err(_) => {
            frame.push(bit | 127);
            frame.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        }
    }
    match mask {
        None => frame.extend_from_slice(payload),
        Some(mask) => {
            frame.extend_from_slice(&mask);
            frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        }
    }
    frame
}

/// The payload of a client's first frame, and the bytes it took; `None` while it is not whole. No turn here is longer than 64 KiB.
fn unmasked(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (len, head) = match bytes.get(1)? & 0x7f {
        126 => (usize::from(u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?])), 4),
        len => (usize::from(len), 2),
    };
    let mask = bytes.get(head..head + 4)?;
    let payload = bytes.get(head + 4..head + 4 + len)?;
    Some((payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect(), head + 4 + len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload;

    /// Without a peer between them, clients hear all the model says.
    #[test]
    fn every_workload_runs_without_a_peer() {
        for work in workload::all().into_iter().filter(Workload::is_plain).map(Workload::small) {
            let model = Model::bind().unwrap();
            let order = Order { work: &work, peer: model.address, prefix: "", key: "none", window: Duration::from_millis(1500) };
            let mut marks = Vec::new();
            let seen = run(&model, &order, &mut |mark| {
                marks.push(mark);
                Ok(())
            })
            .unwrap();
            assert_eq!(seen.faults, Vec::<String>::new(), "{}", work.name);
            assert_eq!((seen.sent, marks), (seen.heard, vec![Mark::Empty, Mark::Begin, Mark::End]), "{}", work.name);
            assert!(seen.turns > 0, "{}", work.name);
            let told = if matches!(work.clients, Clients::Leave(_)) { &seen.leaving } else { &seen.due };
            assert!(work.is_idle() || !told.is_empty(), "{}", work.name);
        }
    }

    #[test]
    fn a_peer_that_answers_with_an_error_is_a_fault() {
        let work = Workload { streams: 1, ..workload::named("W3").unwrap() };
        let (model, other) = (Model::bind().unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let order = Order { work: &work, peer: other.local_addr().unwrap(), prefix: "", key: "none", window: Duration::from_millis(50) };
        let answers = std::thread::spawn(move || {
            let (mut client, _) = other.accept().unwrap();
            let mut request = [0; 1024];
            let _ = client.read(&mut request).unwrap();
            client.write_all(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n").unwrap();
        });
        let seen = run(&model, &order, &mut |_| Ok(())).unwrap();
        answers.join().unwrap();
        assert!(seen.faults.iter().any(|fault| fault.contains("status 503")), "{:?}", seen.faults);
    }
}
