//! A real Apache Kafka: one node in KRaft mode on free ports, which can be stopped, killed and started again where it was.
//!
//! What is read and written here goes through Kafka's own command-line clients, so that two independent implementations have to
//! agree about what is in a topic. Each call of them starts a Java of its own and takes a second or two.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::services::{Missing, Program, Ready, Service, Signal, free_addr};

/// How long one of Kafka's own clients may take on a busy machine.
const CLIENT: Duration = Duration::from_secs(60);
/// Small, quick to start, and gone with us.
const JAVA: [&str; 4] = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"];
/// Keeps a broker on a leash: whoever started it holds the other end of its standard input. Once that is closed nobody is left who
/// would stop the broker or remove its folder, which is `$0`.
const LEASH: &str = r#"exec 3<&0 </dev/null; "$@" 3<&- & { cat; kill -9 $!; sleep 1; rm -rf "$0" "$PWD"; } <&3 >/dev/null 2>&1 &
exec 3<&-; wait"#;

/// A broker, its topics on disk, and the ports that are its own as long as this lives.
pub struct Kafka {
    service: Option<Service>,
    addr: SocketAddr,
    guard: Option<Guard>,
    /// Removed when this is dropped.
    data: TempDir,
}

/// Doors of a broker that do not let everybody in.
#[derive(Debug, Clone)]
pub struct Guard {
    /// Takes users with a password, over TLS: `localhost:port`.
    pub password: String,
    /// Takes the same users in plain text: `localhost:port`.
    pub plain_text: String,
    /// Takes whoever has a certificate of its authority, over TLS: `localhost:port`.
    pub certificate: String,
    /// The authority's certificate.
    pub ca: PathBuf,
    /// A certificate of it, for a client.
    pub client: PathBuf,
    /// The key to that.
    pub client_key: PathBuf,
    /// The certificate of an authority that the broker knows nothing of.
    pub stranger: PathBuf,
}

impl Guard {
    /// The user that is let in, by PLAIN and by SCRAM-SHA-512.
    pub const USER: &str = "headgate";
    /// The user's password.
    pub const PASSWORD: &str = "let-us-in";

    /// Writes certificates into `folder`.
    fn of(folder: &Path) -> Guard {
        let authority = |name: &str| {
            let mut parameters = rcgen::CertificateParams::default();
            parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
            let key = rcgen::KeyPair::generate().expect("a key");
            let pem = parameters.self_signed(&key).expect("a certificate").pem();
            (pem, rcgen::Issuer::new(parameters, key))
        };
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).expect("to write a file");
            path
        };
        let (ca, issuer) = authority("the brokers");
        let signed = |name: &str| {
            let key = rcgen::KeyPair::generate().expect("a key");
            let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).expect("a name");
            parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
            (parameters.signed_by(&key, &issuer).expect("a certificate").pem(), key.serialize_pem())
        };
        let ((broker, broker_key), (client, client_key)) = (signed("broker"), signed(Guard::USER));
        write("broker.pem", broker_key + &broker);
        let door = || format!("localhost:{}", free_addr().port());
        Guard {
            password: door(),
            plain_text: door(),
            certificate: door(),
            ca: write("ca.pem", ca),
            client: write("client.pem", client),
            client_key: write("client.key", client_key),
            stranger: write("stranger.pem", authority("somebody else").0),
        }
    }

    fn properties(&self, data: &Path) -> String {
        let (scram, plain) =
            ("org.apache.kafka.common.security.scram.ScramLoginModule", "org.apache.kafka.common.security.plain.PlainLoginModule");
        let users = ["sasl_ssl", "sasl_plaintext"].map(|listener| {
            format!(
                "listener.name.{listener}.scram-sha-512.sasl.jaas.config={scram} required;\n\
                 listener.name.{listener}.plain.sasl.jaas.config={plain} required user_{}=\"{}\";\n",
                Guard::USER,
                Guard::PASSWORD,
            )
        });
        format!(
            "ssl.keystore.type=PEM\nssl.keystore.location={}\nssl.truststore.type=PEM\nssl.truststore.location={}\n\
             sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512\n{}listener.name.ssl.ssl.client.auth=required\n",
            data.join("broker.pem").display(),
            self.ca.display(),
            users.concat(),
        )
    }
}

/// A record of a topic, as Kafka's own consumer shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its partition.
    pub partition: u32,
    /// Its place there.
    pub offset: u64,
    /// Its key; empty where it has none.
    pub key: String,
    /// Its headers, in order.
    pub headers: Vec<(String, String)>,
    /// Its value.
    pub value: String,
}

impl Record {
    /// The value of the header of that name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }
}

impl Kafka {
    /// A broker without topics. It makes none by itself.
    pub async fn start() -> Result<Kafka, Missing> {
        Kafka::start_with(|_| None).await
    }

    /// The same, with guarded doors beside the open one, at which Kafka's own clients of these tests come in.
    pub async fn guarded() -> Result<Kafka, Missing> {
        let kafka = Kafka::start_with(|data| Some(Guard::of(data))).await?;
        kafka.user(Guard::PASSWORD).await;
        Ok(kafka)
    }

    /// The guarded doors; panics where there are none.
    pub fn guard(&self) -> &Guard {
        self.guard.as_ref().expect("the broker was started without a guard")
    }

    /// Gives the user this password, for SCRAM-SHA-512.
    pub async fn user(&self, password: &str) {
        let (server, password) = (self.addr.to_string(), format!("SCRAM-SHA-512=[password={password}]"));
        let user = ["--bootstrap-server", &server, "--alter", "--entity-type", "users", "--entity-name", Guard::USER];
        self.client("kafka.admin.ConfigCommand", &[&user[..], &["--add-config", &password]].concat()).await;
    }

    async fn start_with(guard: impl Fn(&Path) -> Option<Guard>) -> Result<Kafka, Missing> {
        let data = tempfile::Builder::new().prefix("headgate-kafka-").tempdir().expect("a temporary folder");
        let formatted = folder()?.join("formatted");
        std::fs::create_dir(data.path().join("log")).expect("a folder for the broker");
        for file in ["meta.properties", "bootstrap.checkpoint"] {
            std::fs::copy(formatted.join(file), data.path().join("log").join(file))
                .unwrap_or_else(|error| panic!("cannot copy {file}: {error}; run scripts/tools.sh"));
        }
        let (addr, controller) = (free_addr(), free_addr());
        let guard = guard(data.path());
        let mut settings = properties(addr, controller, guard.as_ref(), data.path());
        settings.extend(guard.as_ref().map(|guard| guard.properties(data.path())));
        std::fs::write(data.path().join("server.properties"), settings).expect("to write a file");
        let mut kafka = Kafka { service: None, addr, guard, data };
        kafka.launch().await?.unwrap_or_else(|sentence| panic!("{sentence}"));
        Ok(kafka)
    }

    /// A broker that all tests of this program share, and which ends with it. Topics of different tests need different names.
    pub async fn shared() -> Result<&'static Kafka, Missing> {
        static SHARED: OnceLock<OnceCell<Result<Kafka, Missing>>> = OnceLock::new();
        let kafka = SHARED.get_or_init(OnceCell::new).get_or_init(|| async {
            // On a runtime that outlives the test that happens to be the first.
            let (tell, told) = tokio::sync::oneshot::channel();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async {
                    let _ = tell.send(Kafka::start().await);
                    std::future::pending::<()>().await;
                });
            });
            told.await.expect("the shared Kafka to be started")
        });
        kafka.await.as_ref().map_err(Clone::clone)
    }

    async fn launch(&mut self) -> Result<Result<(), String>, Missing> {
        let program = java(Program::at("/bin/sh").leashed().arguments(["-c", LEASH]).argument(self.data.path()))?;
        let program = program.argument("kafka.Kafka").argument(self.data.path().join("server.properties"));
        let started = program.try_start(Ready::Connects(self.addr)).await;
        Ok(started.map(|service| self.service = Some(service)))
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Sends its process a signal; panics where it does not run.
    pub fn signal(&self, signal: Signal) {
        self.running().signal(signal);
    }

    fn running(&self) -> &Service {
        self.service.as_ref().expect("the broker was stopped")
    }

    /// Kills it at once: what it had acknowledged is on its disk, or in the system's memory.
    pub async fn kill(&mut self) {
        if let Some(mut service) = self.service.take() {
            service.signal(Signal::Kill);
            service.exited().await;
        }
    }

    /// Starts it again after [`Kafka::kill`], with its topics, on its ports.
    pub async fn again(&mut self) {
        self.launch().await.expect("it was there before").unwrap_or_else(|sentence| panic!("{sentence}"));
    }

    /// Makes a topic with so many partitions and settings like `min.insync.replicas=1`.
    pub async fn topic(&self, name: &str, partitions: u32, settings: &[&str]) {
        let partitions = partitions.to_string();
        let server = self.addr.to_string();
        let mut arguments = vec!["--bootstrap-server", &server, "--create", "--topic", name, "--partitions", &partitions];
        for setting in settings {
            arguments.extend(["--config", setting]);
        }
        self.client("org.apache.kafka.tools.TopicCommand", &arguments).await;
    }

    /// Writes records, each a key and a value.
    pub async fn write(&self, topic: &str, records: &[(&str, &str)]) {
        let lines: String = records.iter().map(|(key, value)| format!("{key}\t{value}\n")).collect();
        let server = self.addr.to_string();
        let arguments = ["--bootstrap-server", &server, "--topic", topic, "--property", "parse.key=true"];
        self.client_given(&lines, "org.apache.kafka.tools.ConsoleProducer", &arguments).await;
    }

    /// Reads so many records of a topic from its beginning: those of each partition in their order. Panics where there are fewer.
    pub async fn read(&self, topic: &str, count: usize) -> Vec<Record> {
        let (server, most) = (self.addr.to_string(), count.to_string());
        let mut arguments = vec!["--bootstrap-server", &server, "--topic", topic, "--from-beginning", "--max-messages", &most];
        arguments.extend(["--timeout-ms", "20000"]);
        for shown in ["print.partition=true", "print.offset=true", "print.key=true", "print.headers=true"] {
            arguments.extend(["--property", shown]);
        }
        let output = self.client("org.apache.kafka.tools.consumer.ConsoleConsumer", &arguments).await;
        let records: Vec<Record> = output.lines().filter_map(parse).collect();
        assert_eq!(records.len(), count, "records of {topic}");
        records
    }

    async fn client(&self, class: &str, arguments: &[&str]) -> String {
        self.client_given("", class, arguments).await
    }

    /// Runs one of Kafka's own clients to its end, with something to read: what it printed. Panics where it fails.
    async fn client_given(&self, input: &str, class: &str, arguments: &[&str]) -> String {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("input"), input).expect("to write a file");
        // Through a file: a topic may hold more than is kept of what a program prints.
        let shell = Program::at("/bin/sh").arguments(["-c", "exec \"$@\" <\"$0/input\" >\"$0/output\""]).argument(folder.path());
        let program = java(shell).expect("it was there when the broker started").argument(class);
        let (status, complaints) = program.arguments(arguments).run(CLIENT).await;
        let output = std::fs::read_to_string(folder.path().join("output")).unwrap_or_default();
        assert!(status.success(), "{class} {arguments:?}: {complaints}{}", output.get(..2000).unwrap_or(&output));
        output
    }
}

/// A line of the console consumer: `Partition:0`, `Offset:7`, headers as `a:b,c:d` or `NO_HEADERS`, key or `null`, value.
fn parse(line: &str) -> Option<Record> {
    let mut parts = line.splitn(5, '\t');
    let partition = parts.next()?.strip_prefix("Partition:")?.parse().ok()?;
    let offset = parts.next()?.strip_prefix("Offset:")?.parse().ok()?;
    let headers = parts.next()?;
    let pairs = headers.split(',').filter_map(|header| header.split_once(':'));
    let headers = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let key = parts.next()?;
    let key = if key == "null" { "" } else { key };
    Some(Record { partition, offset, headers, key: key.to_owned(), value: parts.next()?.to_owned() })
}

/// Where scripts/tools.sh has put Kafka, or the folder that `HEADGATE_KAFKA` names.
fn folder() -> Result<PathBuf, Missing> {
    let named = std::env::var_os("HEADGATE_KAFKA").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let folder = named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/kafka"));
    match folder.join(".stamp").is_file() {
        true => Ok(folder),
        false => Err(Missing { what: "Apache Kafka".into(), how: "scripts/tools.sh, or set HEADGATE_KAFKA".into() }),
    }
}

/// The program, told to run Java with Kafka's classes.
fn java(program: Program) -> Result<Program, Missing> {
    let libs = folder()?.join("libs/*");
    let java = Program::find(&["java"], "HEADGATE_JAVA", "apt-get install default-jre-headless")?;
    Ok(program.argument(java.path()).arguments(JAVA).argument("-cp").argument(libs))
}

fn properties(addr: SocketAddr, controller: SocketAddr, guard: Option<&Guard>, data: &Path) -> String {
    let doors = |guard: &Guard| format!(",SASL_SSL://{},SASL_PLAINTEXT://{},SSL://{}", guard.password, guard.plain_text, guard.certificate);
    let guarded = guard.map(doors).unwrap_or_default();
    format!(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@{controller}\n\
         listeners=PLAINTEXT://{addr},CONTROLLER://{controller}{guarded}\n\
         advertised.listeners=PLAINTEXT://{addr}{guarded}\ncontroller.listener.names=CONTROLLER\n\
         inter.broker.listener.name=PLAINTEXT\n\
         listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,SSL:SSL\n\
         log.dirs={}\nauto.create.topics.enable=false\n\
         offsets.topic.replication.factor=1\noffsets.topic.num.partitions=1\ngroup.initial.rebalance.delay.ms=0\n\
         controller.quorum.election.timeout.ms=200\nbroker.session.timeout.ms=2000\nbroker.heartbeat.interval.ms=300\nnum.network.threads=1\nnum.io.threads=2\nlog.cleaner.enable=false\n",
        data.join("log").display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::OrSkip;

    #[tokio::test]
    async fn kafka_keeps_what_is_produced_and_comes_back_where_it_was() {
        let Some(mut kafka) = Kafka::start().await.or_skip("kafka_keeps_what_is_produced_and_comes_back_where_it_was") else { return };
        kafka.topic("letters", 2, &["min.insync.replicas=1"]).await;
        kafka.write("letters", &[("a", "one"), ("a", "two")]).await;
        kafka.kill().await;
        kafka.again().await;
        kafka.write("letters", &[("a", "three")]).await;
        let read = kafka.read("letters", 3).await;
        let values: Vec<&str> = read.iter().map(|record| record.value.as_str()).collect();
        assert_eq!(values, ["one", "two", "three"]);
        assert!(read.iter().all(|record| record.key == "a" && record.partition == read[0].partition));
    }
}
