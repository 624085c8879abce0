//! Asking the hub, and understanding why it refuses.

use std::{fmt, time::Duration};

use hf_hub::{
    Repo, RepoType,
    api::sync::{Api, ApiBuilder},
};
use ureq::{Body, http::Response};

use crate::{Cache, Error, Listing, ModelName, Result, Revision};

/// The public hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// How long a connection may take to be made.
const CONNECTING: Duration = Duration::from_secs(20);
/// How long nothing may come over a connection before it counts as dead.
const SILENCE: Duration = Duration::from_secs(60);
/// The largest list of files that is read.
const MAX_LISTING: u64 = 64 << 20;

/// What the hub is asked with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The hub's address.
    pub endpoint: String,
    /// Who asks, if not anybody.
    pub token: Option<Token>,
    /// Where files are kept.
    pub cache: Cache,
    /// How often in a row something that may pass is tried again.
    pub retries: u32,
    /// How long to wait before the first time; twice as long before each further.
    pub backoff: Duration,
}

/// What the hub knows a user by. It is shown nowhere, also not by `Debug`.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// The token in this text, which may have blanks around it.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        let good = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        if good { Ok(Self(text.to_owned())) } else { Err(Error::Token) }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A hub, and the cache that its files go to.
pub struct Hub {
    api: Api,
    pub(crate) options: Options,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The client would show its headers, and the token in them.
        f.debug_struct("Hub").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Hub {
    /// Nothing is sent yet.
    pub fn new(mut options: Options) -> Result<Self> {
        let endpoint = options.endpoint.trim_end_matches('/').to_owned();
        let host = endpoint.strip_prefix("https://").or(endpoint.strip_prefix("http://"));
        let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '?' | '#' | '@');
        if !host.is_some_and(|host| !host.is_empty() && host.chars().all(plain)) {
            return Err(Error::Name {
                what: "address of a hub",
                given: options.endpoint,
                expected: "https://HOST, in HF_ENDPOINT",
            });
        }
        options.endpoint = endpoint;
        let api = ApiBuilder::from_cache(hf_hub::Cache::new(options.cache.path().to_owned()))
            .with_endpoint(options.endpoint.clone())
            .with_token(options.token.as_ref().map(|token| token.0.clone()))
            .with_user_agent("apr", env!("CARGO_PKG_VERSION"))
            .build();
        match api {
            Ok(api) => Ok(Self { api, options }),
            Err(e) => {
                Err(Error::Answer { url: options.endpoint, problem: format!("no client: {e}") })
            }
        }
    }

    /// Where files are kept.
    pub fn cache(&self) -> &Cache {
        &self.options.cache
    }

    /// Asks what a model has at a revision.
    pub fn list(&self, model: &ModelName, revision: &Revision) -> Result<Listing> {
        let url = format!(
            "{}/api/models/{model}/revision/{}?blobs=true",
            self.endpoint(),
            part(revision)
        );
        let about = About { model, revision, file: None };
        let mut failures = 0;
        let mut response = loop {
            match self.get(&url, None, about) {
                // Who is not there at all is asked once: a name that does not resolve will not in a moment.
                Err(e) if !matches!(e, Error::Unreachable { .. }) => {
                    self.pause(e, &mut failures, &mut |_, _| {})?;
                }
                answered => break answered?,
            }
        };
        let answer = response.body_mut().with_config().limit(MAX_LISTING).read_to_vec();
        let answer = answer.map_err(|e| self.unreachable(&url, e))?;
        Listing::parse(model, revision, &answer)
            .map_err(|problem| Error::Answer { url: without_query(&url), problem })
    }

    /// The bytes of a file from `start` on, if the server can do that, and all of them if not.
    pub(crate) fn open(&self, listing: &Listing, path: &str, start: u64) -> Result<Response<Body>> {
        // By commit, so that all files are of the same one.
        let repo =
            Repo::with_revision(listing.model.to_string(), RepoType::Model, listing.commit.clone());
        let url = self.api.repo(repo).url(&encoded(path));
        let about = About { model: &listing.model, revision: &listing.revision, file: Some(path) };
        self.get(&url, (start > 0).then(|| format!("bytes={start}-")), about)
    }

    fn get(&self, url: &str, range: Option<String>, about: About<'_>) -> Result<Response<Body>> {
        // hf-hub offers its client for this one request; with another address it serves for all.
        let mut request = self.api.model(about.model.to_string()).info_request().uri(url);
        // Sizes and offsets are of the bytes as they are.
        request = request.header("Accept-Encoding", "identity");
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        let response = request
            .config()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECTING))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build()
            .call()
            .map_err(|e| self.unreachable(url, e))?;
        match response.status().is_success() {
            true => Ok(response),
            false => Err(self.refusal(url, &response, about)),
        }
    }

    fn endpoint(&self) -> &str {
        &self.options.endpoint
    }

    /// Waits before something is tried again, unless it was tried often enough or will not pass.
    pub(crate) fn pause(
        &self,
        error: Error,
        failures: &mut u32,
        tell: &mut dyn FnMut(&Error, Duration),
    ) -> Result<()> {
        /// Nobody should wait longer without having been asked.
        const LONGEST: Duration = Duration::from_secs(60);
        let backoff = self.options.backoff.saturating_mul(1 << (*failures).min(10)).min(LONGEST);
        let wait = match &error {
            Error::RateLimited { retry_after: Some(wait), .. } => *wait,
            _ => backoff,
        };
        if !error.is_passing() || *failures >= self.options.retries || wait > LONGEST {
            return Err(error);
        }
        *failures += 1;
        tell(&error, wait);
        std::thread::sleep(wait);
        Ok(())
    }

    fn unreachable(&self, url: &str, error: ureq::Error) -> Error {
        use ureq::Error as E;
        match error {
            E::Io(_)
            | E::Timeout(_)
            | E::HostNotFound
            | E::ConnectionFailed
            | E::Tls(_)
            | E::Rustls(_) => {
                Error::Unreachable { host: self.endpoint().to_owned(), source: Box::new(error) }
            }
            other => Error::Answer { url: without_query(url), problem: other.to_string() },
        }
    }

    fn refusal(&self, url: &str, response: &Response<Body>, about: About<'_>) -> Error {
        let header = |name: &str| {
            let value = response.headers().get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().chars().take(200).collect::<String>()
        };
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        let with_token = self.options.token.is_some();
        let (model, host) = (about.model.to_string(), self.endpoint().to_owned());
        let url = without_query(url);
        match (code.as_str(), response.status().as_u16(), about.file) {
            ("GatedRepo", ..) => {
                let page = format!("{host}/{model}");
                Error::Gated { model, page, with_token }
            }
            ("RevisionNotFound", ..) => {
                Error::NoRevision { model, revision: about.revision.to_string() }
            }
            ("EntryNotFound", _, Some(file)) => Error::NoFile { model, file: file.to_owned() },
            ("RepoNotFound", ..) => Error::NoModel { model, host, with_token },
            (_, 401, _) if with_token => Error::TokenRefused { host },
            (_, 404, Some(file)) => Error::NoFile { model, file: file.to_owned() },
            (_, 401 | 404, _) => Error::NoModel { model, host, with_token },
            (_, 403, _) => Error::Forbidden { url, message },
            (_, 429, _) => {
                let seconds = header("retry-after").trim().parse().ok();
                let seconds = seconds.or_else(|| reset(&header("ratelimit")));
                let retry_after = seconds.map(Duration::from_secs);
                Error::RateLimited { host, retry_after, with_token }
            }
            (_, status, _) => Error::Status { url, status, message },
        }
    }
}

/// What a request is about, for the message if it is refused.
#[derive(Clone, Copy)]
struct About<'a> {
    model: &'a ModelName,
    revision: &'a Revision,
    file: Option<&'a str>,
}

/// The seconds in `"api";r=0;t=42`, as the hub says when its limit is over.
fn reset(ratelimit: &str) -> Option<u64> {
    ratelimit
        .split(';')
        .find_map(|field| field.trim().strip_prefix("t="))
        .and_then(|t| t.parse().ok())
}

fn without_query(url: &str) -> String {
    url.split('?').next().unwrap_or(url).to_owned()
}

/// A revision as one part of an address.
fn part(revision: &Revision) -> String {
    encoded(revision.as_str()).replace('/', "%2F")
}

/// A path as an address has it.
fn encoded(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                text.push(byte.into());
            }
            _ => text += &format!("%{byte:02X}"),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_parts_of_addresses() {
        assert_eq!(encoded("a b/ü#?.gguf"), "a%20b/%C3%BC%23%3F.gguf");
        assert_eq!(part(&"refs/pr/1".parse().unwrap()), "refs%2Fpr%2F1");
    }

    #[test]
    fn the_hubs_own_header_says_when_its_limit_is_over() {
        assert_eq!(reset("\"api\";r=0;t=42"), Some(42));
        assert_eq!(reset("\"api\""), None);
    }

    #[test]
    fn a_token_is_never_shown() {
        let token = Token::new(" hf_secret\n").unwrap();
        let options = Options {
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            token: Some(token),
            cache: Cache::new("cache".into()),
            retries: 0,
            backoff: Duration::ZERO,
        };
        let hub = Hub::new(options).unwrap();
        assert!(!format!("{hub:?}").contains("hf_secret"));
        let error = Token::new("hf_se cret").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("cret"));
    }

    #[test]
    fn an_endpoint_that_is_no_address_is_refused() {
        for bad in ["", "huggingface.co", "ftp://x", "https://", "https://user:pass@x"] {
            let options = Options {
                endpoint: bad.to_owned(),
                token: None,
                cache: Cache::new("cache".into()),
                retries: 0,
                backoff: Duration::ZERO,
            };
            assert!(Hub::new(options).is_err(), "{bad}");
        }
    }
}
