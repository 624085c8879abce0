//! A small server that speaks the hub's routes, on this machine, with the faults that networks and hubs have.
//!
//! It answers as the public hub was seen to: large files by a redirect to another host, small ones itself, refusals with the
//! headers that say why. One request per connection.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use serde_json::json;
use sha1::{Digest, Sha1};
use sha2::Sha256;

/// A hub that ends with its owner.
#[derive(Debug)]
pub struct HubServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

/// Who may see a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody.
    Public,
    /// Its list of files anybody, its files who has [`HubServer::TOKEN`].
    Gated,
    /// Who has the token; for others it is not there.
    Private,
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Nothing more comes after so many bytes of the body, and the connection stays.
    Stall(usize),
    /// One byte of the body is another.
    Corrupt,
    /// `Range` is not understood: the whole file is sent.
    NoRange,
    /// A refusal, with headers.
    Refuse(u16, &'static [(&'static str, &'static str)]),
}

/// A request as it came.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The path with its query.
    pub target: String,
    /// The header `Range`.
    pub range: Option<String>,
    /// The header `Authorization`.
    pub authorization: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    models: BTreeMap<String, Model>,
    faults: Vec<(String, Fault, usize)>,
    requests: Vec<Request>,
    stopped: bool,
}

#[derive(Debug)]
struct Model {
    commit: String,
    access: Access,
    files: BTreeMap<String, Vec<u8>>,
}

struct Response {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl HubServer {
    /// The one token that the hub knows.
    pub const TOKEN: &str = "hf_tokenOfTheTests";

    /// Starts a hub without models.
    ///
    /// # Panics
    /// If the machine has no loopback interface.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port of the loopback interface");
        let address = listener.local_addr().expect("a bound listener has an address");
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if lock(&shared).stopped {
                    break;
                }
                let shared = Arc::clone(&shared);
                // A client that goes away is not the server's affair.
                thread::spawn(move || drop(serve(stream, address, &shared)));
            }
        });
        Self { address, state }
    }

    /// What `HF_ENDPOINT` has to be.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Adds or replaces a model, and returns its commit.
    pub fn add(&self, name: &str, access: Access, files: &[(&str, &[u8])]) -> String {
        let files: BTreeMap<_, _> =
            files.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
        let mut commit = Sha1::new();
        for (path, bytes) in &files {
            commit.update(path);
            commit.update(bytes);
        }
        let commit = hex(&commit.finalize());
        let model = Model { commit: commit.clone(), access, files };
        lock(&self.state).models.insert(name.to_owned(), model);
        commit
    }

    /// The same with the files of a directory.
    ///
    /// # Panics
    /// If they cannot be read.
    pub fn add_directory(&self, name: &str, directory: &Path) -> String {
        let mut files = Vec::new();
        for entry in fs::read_dir(directory).expect("the directory can be read") {
            let path = entry.expect("the directory can be read").path();
            let bytes = fs::read(&path).expect("the file can be read");
            let name = path.file_name().and_then(|n| n.to_str()).expect("names are UTF-8");
            files.push((name.to_owned(), bytes));
        }
        let files: Vec<_> = files.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
        self.add(name, Access::Public, &files)
    }

    /// Makes the next `times` answers with bytes (for refusals: all answers) to requests for `path` go wrong. `path` is a
    /// file's name or a part of an address.
    pub fn fail(&self, path: &str, fault: Fault, times: usize) {
        lock(&self.state).faults.push((path.to_owned(), fault, times));
    }

    /// The requests since the last call, in the order in which they came.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.state).requests)
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        lock(&self.state).stopped = true;
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
    }
}

/// SHA-256 in hexadecimal, as the hub names large files.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Git's name of a file.
pub fn git_blob(bytes: &[u8]) -> String {
    let header = format!("blob {}\0", bytes.len());
    hex(&Sha1::new().chain_update(header.as_bytes()).chain_update(bytes).finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes any text");
        text
    })
}

/// A test that panics must not take the others' server with it.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut stream: TcpStream, address: SocketAddr, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).take(1 << 16).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ');
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let mut request = Request { target: target.to_owned(), ..Request::default() };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        match line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value)) {
            Some((name, value)) if name == "range" => request.range = Some(value.to_owned()),
            Some((name, value)) if name == "authorization" => {
                request.authorization = Some(value.to_owned());
            }
            _ => {}
        }
    }
    let (mut response, fault) = {
        let mut state = lock(state);
        state.requests.push(request.clone());
        let response = answer(&state, &request, address);
        let fault = fault(&mut state, &request, &response);
        (response, fault)
    };
    if let Some(Fault::Refuse(status, headers)) = fault {
        response = refuse(status, headers);
    }
    if response.status == 200
        && let Some(start) = request.range.as_deref().and_then(range_start)
        && !matches!(fault, Some(Fault::NoRange))
    {
        response = from(response, start);
    }
    if let (Some(Fault::Corrupt), Some(byte)) = (&fault, response.body.last_mut()) {
        *byte ^= 1;
    }
    let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", response.status);
    for (name, value) in &response.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    let _ = write!(head, "Content-Length: {}\r\n\r\n", response.body.len());
    stream.write_all(head.as_bytes())?;
    if method == "HEAD" {
        return Ok(());
    }
    match fault {
        Some(Fault::Cut(n)) => {
            stream.write_all(&response.body[..n.min(response.body.len())])?;
            stream.shutdown(Shutdown::Both)
        }
        Some(Fault::Stall(n)) => {
            stream.write_all(&response.body[..n.min(response.body.len())])?;
            while !lock(state).stopped {
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        }
        _ => stream.write_all(&response.body),
    }
}

/// The fault that this answer is to have.
fn fault(state: &mut State, request: &Request, response: &Response) -> Option<Fault> {
    // The name of a large file is not in the address that its bytes are at.
    let names = state.models.values().flat_map(|model| &model.files);
    let name = names.filter(|(_, bytes)| request.target.contains(&sha256(bytes))).map(|(n, _)| n);
    let names: Vec<String> = name.cloned().collect();
    let at = state.faults.iter().position(|(path, fault, times)| {
        let meant = request.target.contains(path.as_str()) || names.contains(path);
        *times > 0 && meant && (response.status == 200 || matches!(fault, Fault::Refuse(..)))
    })?;
    state.faults[at].2 -= 1;
    Some(state.faults[at].1.clone())
}

fn answer(state: &State, request: &Request, address: SocketAddr) -> Response {
    let target = request.target.split('?').next().unwrap_or_default();
    if let Some(digits) = target.strip_prefix("/cdn/") {
        let mut files = state.models.values().flat_map(|model| model.files.values());
        return match files.find(|bytes| sha256(bytes) == digits) {
            Some(bytes) => Response { status: 200, headers: Vec::new(), body: bytes.clone() },
            None => refuse(404, &[]),
        };
    }
    let known = format!("Bearer {}", HubServer::TOKEN);
    let authorised = match &request.authorization {
        None => false,
        Some(given) if *given == known => true,
        Some(_) => {
            return refuse(
                401,
                &[("x-error-message", "Invalid credentials in Authorization header")],
            );
        }
    };
    let (api, path) = match target.strip_prefix("/api/models/") {
        Some(path) => (true, path),
        None => (false, target.trim_start_matches('/')),
    };
    let verb = if api { "/revision/" } else { "/resolve/" };
    let Some((name, rest)) = path.split_once(verb) else { return refuse(404, &[]) };
    let model = state.models.get(name);
    let Some(model) = model.filter(|m| m.access != Access::Private || authorised) else {
        let status = if authorised { 404 } else { 401 };
        return refuse(status, &[("x-error-code", "RepoNotFound")]);
    };
    let (revision, file) = rest.split_once('/').unwrap_or((rest, ""));
    if revision != "main" && revision != model.commit {
        return refuse(404, &[("x-error-code", "RevisionNotFound")]);
    }
    if api {
        let body = listing(model, name).to_string().into_bytes();
        return Response { status: 200, headers: Vec::new(), body };
    }
    if model.access == Access::Gated && !authorised {
        return refuse(401, &[("x-error-code", "GatedRepo")]);
    }
    match model.files.get(&decoded(file)) {
        Some(bytes) => resolve(model, file, bytes, address),
        None => refuse(404, &[("x-error-code", "EntryNotFound")]),
    }
}

fn listing(model: &Model, name: &str) -> serde_json::Value {
    let file = |(path, bytes): (&String, &Vec<u8>)| {
        let mut file = json!({ "rfilename": path, "size": bytes.len(), "blobId": git_blob(bytes) });
        if is_large(path) {
            file["lfs"] =
                json!({ "sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134 });
        }
        file
    };
    let siblings: Vec<_> = model.files.iter().map(file).collect();
    json!({ "id": name, "sha": model.commit, "private": false, "siblings": siblings })
}

fn resolve(model: &Model, path: &str, bytes: &[u8], address: SocketAddr) -> Response {
    let header = |name: &str, value: String| (name.to_owned(), value);
    let mut headers = vec![header("x-repo-commit", model.commit.clone())];
    if !is_large(path) {
        headers.push(header("etag", format!("\"{}\"", git_blob(bytes))));
        return Response { status: 200, headers, body: bytes.to_vec() };
    }
    let digits = sha256(bytes);
    let port = address.port();
    headers.push(header("x-linked-etag", format!("\"{digits}\"")));
    headers.push(header("x-linked-size", bytes.len().to_string()));
    // Another name for this machine, which must not see the token.
    headers.push(header("location", format!("http://localhost:{port}/cdn/{digits}?signature=x")));
    Response { status: 302, headers, body: Vec::new() }
}

fn is_large(path: &str) -> bool {
    [".safetensors", ".gguf", ".apr"].iter().any(|end| path.ends_with(end))
}

fn refuse(status: u16, headers: &[(&str, &str)]) -> Response {
    let headers = headers.iter().map(|&(n, v)| (n.to_owned(), v.to_owned())).collect();
    Response { status, headers, body: b"no".to_vec() }
}

fn range_start(range: &str) -> Option<usize> {
    range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

fn from(whole: Response, start: usize) -> Response {
    let size = whole.body.len();
    if start >= size {
        return Response { status: 416, body: Vec::new(), ..whole };
    }
    let mut headers = whole.headers;
    headers.push(("content-range".to_owned(), format!("bytes {start}-{}/{size}", size - 1)));
    Response { status: 206, headers, body: whole.body[start..].to_vec() }
}

fn decoded(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
