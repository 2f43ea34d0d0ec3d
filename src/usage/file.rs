//! The ledger's files: one for each container and day, so that no two writers share one.
//!
//! ```text
//! {workspace}/{client}/{user}/.greenroom/usage/2026-11-21~host-1f2e3d4c.jsonl
//! {workspace}/{client}/.greenroom/usage/…        of a client's requests over the network
//! {workspace}/.greenroom/usage/…                 of nobody's
//! ```

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::{Timestamp, civil::Date, tz::TimeZone};

use super::row::{Request, Row};
use crate::{
    domain::Account,
    identity::{ClientId, UserId},
    lease::Owner,
};

/// Read at once.
const PIECE: usize = 256 << 10;
/// The longest line; ours have a few hundred bytes.
const MAX_LINE: usize = 64 << 10;
/// A file that did not grow for so long is looked at less often.
const LIVELY: Duration = Duration::from_secs(15 * 60);
/// Files that are kept open.
const MAX_OPEN: usize = 64;

/// Where an account's lines go.
pub(super) fn folder(root: &Path, account: &Account) -> PathBuf {
    let mut folder = root.to_owned();
    if let Some(client) = &account.client {
        folder.push(client.as_str());
        if let Some(user) = &account.user {
            folder.push(user.as_str());
        }
    }
    usage_below(&folder)
}

fn usage_below(folder: &Path) -> PathBuf {
    folder.join(".greenroom").join("usage")
}

/// Whose ledgers are read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Tenants {
    /// `None`: all clients.
    pub client: Option<ClientId>,
    /// `None`: all users, and what no user of the client's spent.
    pub user: Option<UserId>,
}

impl Tenants {
    /// All folders of them that there are. Blocking.
    fn folders(&self, root: &Path) -> io::Result<Vec<PathBuf>> {
        let mut folders = Vec::new();
        let clients = match &self.client {
            Some(client) => vec![root.join(client.as_str())],
            None => {
                folders.push(usage_below(root));
                subfolders(root)?
            }
        };
        for client in clients {
            match &self.user {
                Some(user) => folders.push(usage_below(&client.join(user.as_str()))),
                None => {
                    folders.push(usage_below(&client));
                    let users = subfolders(&client)?;
                    folders.extend(users.iter().map(|user| usage_below(user)));
                }
            }
        }
        Ok(folders)
    }
}

/// Folders whose names are ids: those never begin with a dot.
fn subfolders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry?;
        let is_id = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.parse::<ClientId>().is_ok());
        // Links are not followed: they are not ours.
        if is_id && entry.file_type()?.is_dir() {
            folders.push(entry.path());
        }
    }
    Ok(folders)
}

/// This process's own files.
#[derive(Debug)]
pub(super) struct Writer {
    root: PathBuf,
    /// Names this process's files.
    container: String,
    open: Mutex<HashMap<PathBuf, Place>>,
}

/// A request's file: its second line goes where its first one went.
#[derive(Debug, Clone)]
pub(super) struct Place(Arc<Output>);

#[derive(Debug)]
struct Output {
    file: File,
    /// A write failed and may have left half a line.
    is_torn: AtomicBool,
}

impl Writer {
    pub(super) fn new(root: &Path) -> Self {
        let mut host = Owner::this().host.clone();
        host.retain(|c| c.is_ascii_alphanumeric() || c == '-');
        host.truncate(40);
        let unique = uuid::Uuid::new_v4().simple().to_string();
        Self {
            root: root.to_owned(),
            container: format!("{host}-{}", &unique[..8]),
            open: Mutex::default(),
        }
    }

    /// Is the file one of ours?
    pub(super) fn wrote(&self, path: &Path) -> bool {
        container_of(path) == Some(self.container.as_str())
    }

    /// Writes a request's first line. It is in the kernel's hands when this returns, and survives
    /// the process; [`Place::sync`] brings it to the disk. Blocking.
    pub(super) fn begin(&self, row: &Row, request: &Request) -> io::Result<Place> {
        let day = request.at.to_zoned(TimeZone::UTC).date();
        let path =
            folder(&self.root, &request.account).join(format!("{day}~{}.jsonl", self.container));
        let place = self.file(path)?;
        place.append(row)?;
        Ok(place)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Place>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, path: PathBuf) -> io::Result<Place> {
        if let Some(place) = self.lock().get(&path) {
            return Ok(place.clone());
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)?;
        let is_new = file.metadata()?.len() == 0;
        let place = Place(Arc::new(Output {
            file,
            is_torn: AtomicBool::new(false),
        }));
        if is_new {
            place.append(&Row::Opened {
                at: Timestamp::now(),
                owner: Owner::this().clone(),
            })?;
        }
        let mut open = self.lock();
        if open.len() >= MAX_OPEN {
            // Those in use live on with their users.
            open.clear();
        }
        Ok(open.entry(path).or_insert(place).clone())
    }
}

impl Place {
    /// Appends a line, by one write. Blocking.
    pub(super) fn append(&self, row: &Row) -> io::Result<()> {
        let mut line = row.line();
        if self.0.is_torn.swap(true, Ordering::Relaxed) {
            line.insert(0, b'\n');
        }
        (&self.0.file).write_all(&line)?;
        self.0.is_torn.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// What was appended has reached the disk when this returns. Blocking.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.0.file.sync_data()
    }
}

fn container_of(path: &Path) -> Option<&str> {
    let (_, container) = path.file_stem()?.to_str()?.split_once('~')?;
    Some(container)
}

fn day_of(path: &Path) -> Option<Date> {
    if path.extension()? != "jsonl" {
        return None;
    }
    let (day, _) = path.file_stem()?.to_str()?.split_once('~')?;
    day.parse().ok()
}

/// Reads ledgers from where it read them last.
#[derive(Debug, Default)]
pub(super) struct Tail {
    files: HashMap<PathBuf, Position>,
}

#[derive(Debug, Default)]
struct Position {
    /// Of the first byte that was not read as a whole line.
    offset: u64,
    /// Length when it was last looked at.
    seen: u64,
    /// When it was last seen to have grown.
    grew: Option<Instant>,
    /// Nobody will write to it any more.
    is_final: bool,
    owner: Option<Arc<Owner>>,
}

/// Which of the known files are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// All that may have grown.
    All,
    /// Those that grew not long ago.
    Lively,
}

/// A line and whose it is.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    pub(super) row: Row,
    /// Who wrote the file, where its first line says so.
    pub(super) owner: Option<&'a Arc<Owner>>,
}

impl Tail {
    /// Looks for files of these tenants from `since` on (`None`: all) that `wanted` takes.
    /// Blocking.
    pub(super) fn find(
        &mut self,
        root: &Path,
        tenants: &Tenants,
        since: Option<Date>,
        wanted: impl Fn(&Path) -> bool,
    ) -> io::Result<()> {
        for folder in tenants.folders(root)? {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let path = entry?.path();
                let is_recent =
                    day_of(&path).is_some_and(|day| since.is_none_or(|since| day >= since));
                if is_recent && wanted(&path) {
                    self.files.entry(path).or_default();
                }
            }
        }
        Ok(())
    }

    /// Forgets files of days before this one.
    pub(super) fn forget_before(&mut self, day: Date) {
        self.files
            .retain(|path, _| day_of(path).is_some_and(|of| of >= day));
    }

    /// Gives every line that was added to the known files since the last time. A torn last line
    /// is left for the next time. Blocking.
    pub(super) fn read(&mut self, look: Look, mut sink: impl FnMut(Entry<'_>)) -> io::Result<()> {
        let today = Timestamp::now().to_zoned(TimeZone::UTC).date();
        for (path, position) in &mut self.files {
            let is_lively = position.grew.is_none_or(|at| at.elapsed() < LIVELY);
            if position.is_final || (look == Look::Lively && !is_lively) {
                continue;
            }
            // Asked before, so that nothing is written between the reading and the asking. A
            // request lasts no two days.
            let is_dead = position.owner.as_ref().is_some_and(|owner| owner.is_gone());
            let is_old = day_of(path).is_some_and(|day| (today - day).get_days() > 2);
            match position.read(path, &mut sink) {
                Ok(()) => position.is_final = is_dead || is_old,
                // Removed by its operator: what it said was said.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Position {
    fn read(&mut self, path: &Path, sink: &mut impl FnMut(Entry<'_>)) -> io::Result<()> {
        // Opening asks a network file system for the file's present length.
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        if length == self.seen {
            return Ok(());
        }
        if length < self.offset {
            // Nobody shortens them; what is there now was read already.
            self.offset = length;
        }
        self.seen = length;
        self.grew = Some(Instant::now());
        file.seek(SeekFrom::Start(self.offset))?;
        let mut rest: Vec<u8> = Vec::new();
        let mut piece = vec![0; PIECE];
        loop {
            let read = match file.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            rest.extend_from_slice(&piece[..read]);
            let mut begin = 0;
            while let Some(end) = rest[begin..].iter().position(|byte| *byte == b'\n') {
                let line = &rest[begin..begin + end];
                begin += end + 1;
                if line.is_empty() {
                    continue;
                }
                match Row::parse(line) {
                    Some(Row::Opened { owner, .. }) => self.owner = Some(Arc::new(owner)),
                    Some(row) => sink(Entry {
                        row,
                        owner: self.owner.as_ref(),
                    }),
                    // Torn by a crash of the machine, with more after it.
                    None => {
                        tracing::warn!(path = %path.display(), "a line of the ledger is unreadable")
                    }
                }
            }
            rest.drain(..begin);
            self.offset += begin as u64;
            if rest.len() > MAX_LINE {
                self.offset += rest.len() as u64;
                rest.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::Tokens;

    fn request(id: &str, account: Account, at: &str) -> Request {
        Request {
            at: at.parse().unwrap(),
            id: id.into(),
            account,
            model: "m".into(),
            message: None,
            tokens: Tokens::default(),
            cost_usd: 1.0,
            duration_ms: 0,
            is_estimated: false,
            is_unpriced: false,
            is_uncounted: false,
        }
    }

    fn of(client: &str, user: &str) -> Account {
        Account {
            client: (!client.is_empty()).then(|| client.parse().unwrap()),
            user: (!user.is_empty()).then(|| user.parse().unwrap()),
            ..Account::of_kind("x")
        }
    }

    fn ids(tail: &mut Tail) -> Vec<String> {
        let mut ids = Vec::new();
        tail.read(Look::All, |entry| {
            assert_eq!(entry.owner.map(|owner| owner.as_ref()), Some(Owner::this()));
            match entry.row {
                Row::Reserved(request) => ids.push(format!("{} reserved", request.id)),
                Row::Settled(request) => ids.push(format!("{} settled", request.id)),
                other => panic!("{other:?}"),
            }
        })
        .unwrap();
        ids.sort();
        ids
    }

    #[test]
    fn what_is_written_is_read_once_and_by_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let writer = Writer::new(root);
        let begin = |id: &str, client: &str, user: &str, at: &str| {
            let request = request(id, of(client, user), at);
            let place = writer
                .begin(&Row::Reserved(request.clone()), &request)
                .unwrap();
            place.sync().unwrap();
            (place, request)
        };
        let (place, first) = begin("1", "acme", "alice", "2026-11-21T23:59:59Z");
        begin("2", "acme", "bob", "2026-11-22T00:00:00Z");
        begin("3", "acme", "", "2026-11-22T00:00:00Z");
        begin("4", "globex", "alice", "2026-10-01T00:00:00Z");
        begin("5", "", "", "2026-11-22T00:00:00Z");
        let found = |client: &str, user: &str, since: Option<&str>| {
            let tenants = Tenants {
                client: of(client, "").client,
                user: of("x", user).user,
            };
            let mut tail = Tail::default();
            let since = since.map(|day| day.parse().unwrap());
            tail.find(root, &tenants, since, |_| true).unwrap();
            tail
        };
        let mut alice = found("acme", "alice", None);
        assert_eq!(ids(&mut alice), ["1 reserved"]);
        assert_eq!(ids(&mut found("acme", "", None)).len(), 3);
        assert_eq!(ids(&mut found("", "", None)).len(), 5);
        assert_eq!(ids(&mut found("", "", Some("2026-11-22"))).len(), 3);
        assert!(ids(&mut found("nobody", "", None)).is_empty());

        // The second line goes to the day of the first.
        place.append(&Row::Settled(first)).unwrap();
        assert_eq!(ids(&mut alice), ["1 settled"]);
        assert!(ids(&mut alice).is_empty());
        let file = alice.files.keys().next().unwrap().clone();
        assert!(
            file.to_str()
                .unwrap()
                .contains("acme/alice/.greenroom/usage/2026-11-21~")
        );
        assert!(writer.wrote(&file) && !Writer::new(root).wrote(&file));
    }

    #[test]
    fn torn_lines_cost_nothing_but_themselves() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::new(dir.path());
        let whole = request("1", of("acme", "alice"), "2026-11-21T10:00:00Z");
        let place = writer.begin(&Row::Reserved(whole.clone()), &whole).unwrap();
        let line = Row::Settled(whole).line();
        let (half, rest) = line.split_at(line.len() / 2);
        (&place.0.file).write_all(half).unwrap();
        let mut tail = Tail::default();
        tail.find(dir.path(), &Tenants::default(), None, |_| true)
            .unwrap();
        assert_eq!(ids(&mut tail), ["1 reserved"]);
        (&place.0.file).write_all(rest).unwrap();
        assert_eq!(ids(&mut tail), ["1 settled"]);
        (&place.0.file).write_all(b"{\"status\":\"set\n").unwrap();
        (&place.0.file).write_all(&line).unwrap();
        assert_eq!(ids(&mut tail), ["1 settled"]);
    }
}
