//! Keeps one signed registry entry per tenant, in Redis or in a folder, and believes none of them.
//!
//! | | in Redis | in a folder |
//! |---|---|---|
//! | an entry | `policy:{tenant}`; `policy:*` for all tenants without their own | `tenant-{name}.jws`; `any.jws` |
//! | which there are | the set `policies` | its files |
//! | a change | a message on the channel `policies` | is found by looking again |

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use headgate_policy::ANY_TENANT;

use crate::{Redis, Unanswered, cmd, pipe};

/// The set of tenants that have an entry, and the channel that says when one was put.
const INDEX: &str = "policies";
/// The most of one entry that is read. A signed entry is shorter; what is longer is none.
const MOST_BYTES: usize = 8 << 10;
/// Entries asked for together: half a mebibyte at worst, and a few hundred kilobytes for real ones.
const TOGETHER: usize = 64;
/// What nobody waits for may take longer than a turn's budget.
const UNHURRIED: Duration = Duration::from_secs(1);

/// Puts an entry only where the one before it is what the publisher saw.
const PUT: &str = "\
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('PUBLISH', KEYS[2], ARGV[3])
return 1";

/// Where signed entries are kept.
#[derive(Debug, Clone)]
pub enum Store {
    /// For several processes, on several machines.
    Redis(Redis),
    /// For processes of one machine, or of one mounted volume.
    Folder(PathBuf),
}

/// Why an entry was not put.
#[derive(Debug, thiserror::Error)]
pub enum NotPut {
    /// Another entry has been put since the one that was to be followed was read.
    #[error("somebody else has published for this tenant meanwhile: look at what is there now, and publish again")]
    Overtaken,
    /// The store cannot be reached.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
}

/// The store cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Unreachable {
    /// Redis does not answer.
    #[error(transparent)]
    Redis(#[from] Unanswered),
    /// The folder cannot be used.
    #[error("cannot use the policy folder {}", folder.display())]
    Folder {
        /// Which.
        folder: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl Store {
    /// A store in Redis.
    pub fn redis(redis: &Redis) -> Store {
        Store::Redis(redis.within(UNHURRIED))
    }

    /// All entries, as they stand there: signed, or whatever else somebody wrote. At most `most` of them.
    pub async fn entries(&self, most: usize) -> Result<Vec<String>, Unreachable> {
        match self {
            Store::Redis(redis) => {
                let mut tenants: Vec<String> = redis.ask(cmd("SMEMBERS").arg(INDEX)).await?;
                tenants.truncate(most);
                let mut entries = Vec::with_capacity(tenants.len());
                for some in tenants.chunks(TOGETHER) {
                    let mut commands = pipe();
                    for tenant in some {
                        // A key that holds something endless must not fill our memory.
                        commands.getrange(key(tenant), 0, MOST_BYTES as isize);
                    }
                    let found: Vec<Vec<u8>> = redis.ask_all(&commands).await?;
                    entries.extend(found.into_iter().filter(|entry| !entry.is_empty()).map(text));
                }
                Ok(entries)
            }
            Store::Folder(folder) => {
                in_folder(folder, move |folder| {
                    let names = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
                    let files = names.iter().filter(|name| name.extension().is_some_and(|extension| extension == "jws"));
                    files.take(most).map(|file| read(file)).filter_map(Result::transpose).collect()
                })
                .await
            }
        }
    }

    /// The entry of one tenant, as it stands there.
    pub async fn entry(&self, tenant: &str) -> Result<Option<String>, Unreachable> {
        match self {
            Store::Redis(redis) => {
                let found: Vec<u8> = redis.ask(cmd("GETRANGE").arg(key(tenant)).arg(0).arg(MOST_BYTES)).await?;
                Ok(Some(text(found)).filter(|entry| !entry.is_empty()))
            }
            Store::Folder(folder) => {
                let name = file_name(tenant);
                in_folder(folder, move |folder| read(&folder.join(name))).await
            }
        }
    }

    /// Puts `entry` where `before` stands now, and says so to everybody who listens.
    ///
    /// Errors: [`NotPut::Overtaken`] where something else stands there; then nothing was changed.
    pub async fn put(&self, tenant: &str, entry: &str, before: Option<&str>) -> Result<(), NotPut> {
        let before = before.unwrap_or_default();
        let is_put = match self {
            Store::Redis(redis) => {
                let put = cmd("EVAL").arg(PUT).arg(2).arg(key(tenant)).arg(INDEX).arg(before).arg(entry).arg(tenant).to_owned();
                redis.ask(&put).await.map_err(Unreachable::from)?
            }
            Store::Folder(folder) => {
                let (name, entry, before) = (file_name(tenant), entry.to_owned(), before.to_owned());
                in_folder(folder, move |folder| {
                    fs::create_dir_all(folder)?;
                    let lock = File::create(folder.join(".lock"))?;
                    lock.lock()?;
                    let file = folder.join(&name);
                    if read(&file)?.unwrap_or_default() != before {
                        return Ok(false);
                    }
                    let new = folder.join(format!(".{name}.new"));
                    let mut written = File::create(&new)?;
                    written.write_all(entry.as_bytes())?;
                    written.sync_all()?;
                    fs::rename(&new, &file)?;
                    File::open(folder)?.sync_all()?;
                    Ok(true)
                })
                .await?
            }
        };
        if is_put { Ok(()) } else { Err(NotPut::Overtaken) }
    }

    /// Something whenever an entry is put, as far as the store can tell; ends when it no longer can.
    pub(crate) async fn changes(&self) -> Result<stream::BoxStream<'static, ()>, Unanswered> {
        match self {
            Store::Redis(redis) => Ok(redis.listen(INDEX).await?.boxed()),
            Store::Folder(_) => Ok(stream::pending().boxed()),
        }
    }

    /// How long a change may stay unnoticed where nothing tells of it.
    pub(crate) fn look_again(&self) -> Duration {
        match self {
            Store::Redis(_) => Duration::from_secs(5),
            Store::Folder(_) => Duration::from_secs(1),
        }
    }
}

fn key(tenant: &str) -> String {
    format!("policy:{tenant}")
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|wrong| String::from_utf8_lossy(wrong.as_bytes()).into_owned())
}

/// Tenants may have any name; files may not.
fn file_name(tenant: &str) -> String {
    if tenant == ANY_TENANT {
        return "any.jws".to_owned();
    }
    let mut name = "tenant-".to_owned();
    for byte in tenant.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte.into()),
            // Capitals too: some file systems do not tell them apart.
            _ => name.push_str(&format!("%{byte:02x}")),
        }
    }
    name + ".jws"
}

/// What a file holds; `None` where there is none.
fn read(file: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    match File::open(file).and_then(|file| file.take(MOST_BYTES as u64).read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(text(bytes).trim_end().to_owned()).filter(|entry| !entry.is_empty())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn in_folder<T: Send + 'static>(folder: &Path, work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static) -> Result<T, Unreachable> {
    let at = folder.to_owned();
    let done = tokio::task::spawn_blocking(move || work(&at)).await.unwrap_or_else(|_| Err(io::Error::other("interrupted")));
    done.map_err(|source| Unreachable::Folder { folder: folder.to_owned(), source })
}
