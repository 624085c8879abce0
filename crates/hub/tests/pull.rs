//! Pulling from a server that speaks the hub's routes, with the faults of networks.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use apr_hub::{
    Cache, Error, Event, Hub, Listing, ModelName, Options, Pulled, Result, Revision, Token, Want,
    choose,
};
use apr_testkit::hub::{Access, Fault, HubServer, git_blob, sha256};
use tempfile::TempDir;

const NAME: &str = "org/model";
const CONFIG: &[u8] = br#"{"model_type": "qwen2"}"#;

fn weights() -> Vec<u8> {
    (0..300_000u32).flat_map(u32::to_le_bytes).collect()
}

/// A server with one model, and an empty cache.
struct Setup {
    server: HubServer,
    directory: TempDir,
    commit: String,
}

impl Setup {
    fn new(access: Access) -> Self {
        let server = HubServer::start();
        let weights = weights();
        let files: [(&str, &[u8]); 4] = [
            ("README.md", b"not needed"),
            ("config.json", CONFIG),
            ("model.safetensors", &weights),
            ("tokenizer.json", b""),
        ];
        let commit = server.add(NAME, access, &files);
        Self { server, directory: tempfile::tempdir().unwrap(), commit }
    }

    fn hub(&self, token: Option<&str>, retries: u32) -> Hub {
        Hub::new(Options {
            endpoint: self.server.endpoint(),
            token: token.map(|token| Token::new(token).unwrap()),
            cache: Cache::new(self.directory.path().to_owned()),
            retries,
            backoff: Duration::from_millis(1),
        })
        .unwrap()
    }

    fn pull(&self) -> Result<Pulled> {
        pull(&self.hub(None, 0), &mut |_| {})
    }

    /// A path under the model's folder in the cache.
    fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join("models--org--model").join(path)
    }

    fn blob(&self, end: &str) -> PathBuf {
        self.at(&format!("blobs/{}{end}", sha256(&weights())))
    }

    /// The ranges asked for in requests for bytes of large files.
    fn ranges(&self) -> Vec<Option<String>> {
        let requests = self.server.requests().into_iter();
        requests.filter(|r| r.target.starts_with("/cdn/")).map(|r| r.range).collect()
    }
}

fn list(hub: &Hub, name: &str) -> Result<Listing> {
    hub.list(&name.parse::<ModelName>()?, &Revision::default())
}

fn pull(hub: &Hub, watch: &mut dyn FnMut(Event<'_>)) -> Result<Pulled> {
    let listing = list(hub, NAME)?;
    hub.pull(&listing, &choose(&listing, Want::Model)?.files, false, watch)
}

#[test]
fn a_model_is_laid_out_as_huggingface_hub_does_and_not_fetched_twice() {
    let setup = Setup::new(Access::Public);
    let pulled = setup.pull().unwrap();
    let snapshot = setup.at(&format!("snapshots/{}", setup.commit));
    assert_eq!(pulled.directory, snapshot);
    assert_eq!(fs::read_to_string(setup.at("refs/main")).unwrap(), setup.commit);
    for (name, bytes, digits) in [
        ("config.json", CONFIG.to_vec(), git_blob(CONFIG)),
        ("model.safetensors", weights(), sha256(&weights())),
        ("tokenizer.json", Vec::new(), git_blob(b"")),
    ] {
        assert!(fs::read(snapshot.join(name)).unwrap() == bytes, "{name}");
        if cfg!(unix) {
            let target = fs::read_link(snapshot.join(name)).unwrap();
            assert_eq!(target, Path::new("../../blobs").join(digits));
        }
    }
    assert!(!snapshot.join("README.md").exists());
    setup.server.requests();

    let again = setup.pull().unwrap();
    assert!(again.files.iter().all(|file| file.cached), "{again:?}");
    let targets: Vec<_> = setup.server.requests().into_iter().map(|r| r.target).collect();
    assert_eq!(targets, [format!("/api/models/{NAME}/revision/main?blobs=true")]);
}

#[test]
fn a_cut_connection_is_taken_up_where_it_ended_within_a_pull() {
    let setup = Setup::new(Access::Public);
    setup.server.fail("model.safetensors", Fault::Cut(400_000), 2);
    let (mut waits, mut planned, mut received) = (0, None, Vec::new());
    let pulled = pull(&setup.hub(None, 1), &mut |event| match event {
        Event::Retrying { error, .. } => {
            assert!(matches!(error, Error::Interrupted { .. }), "{error}");
            waits += 1;
        }
        Event::Planned { files, bytes } => planned = Some((files, bytes)),
        Event::Received(n) => received.push(n),
        _ => {}
    });
    pulled.unwrap();
    assert_eq!(waits, 2);
    assert_eq!(planned, Some((3, 1_200_000 + CONFIG.len() as u64)));
    assert!(received.contains(&400_000) && received.contains(&1_200_000), "{received:?}");
    assert_eq!(
        setup.ranges(),
        [None, Some("bytes=400000-".to_owned()), Some("bytes=800000-".to_owned())]
    );
    assert!(fs::read(setup.blob("")).unwrap() == weights());
}

#[test]
fn an_interrupted_pull_leaves_nothing_under_a_final_name_and_the_next_goes_on() {
    let setup = Setup::new(Access::Public);
    setup.server.fail("model.safetensors", Fault::Cut(500_000), 1);
    match setup.pull() {
        Err(Error::Interrupted { received: 500_000, size: 1_200_000, file, .. }) => {
            assert_eq!(file, "model.safetensors");
        }
        other => panic!("{other:?}"),
    }
    assert!(!setup.blob("").exists());
    assert!(!setup.at("refs/main").exists());
    assert_eq!(fs::metadata(setup.blob(".incomplete")).unwrap().len(), 500_000);
    setup.server.requests();

    let pulled = setup.pull().unwrap();
    let resumed: Vec<_> = pulled.files.iter().map(|file| file.resumed).collect();
    assert_eq!(resumed, [0, 500_000, 0]);
    assert_eq!(setup.ranges(), [Some("bytes=500000-".to_owned())]);
    assert!(fs::read(setup.blob("")).unwrap() == weights());
    assert!(!setup.blob(".incomplete").exists());
}

#[test]
fn a_part_that_is_already_whole_is_summed_and_not_asked_for() {
    let setup = Setup::new(Access::Public);
    fs::create_dir_all(setup.at("blobs")).unwrap();
    fs::write(setup.blob(".incomplete"), weights()).unwrap();
    setup.pull().unwrap();
    assert_eq!(setup.ranges(), []);
    assert!(setup.blob("").exists());
}

#[test]
fn a_server_that_cannot_send_parts_sends_the_file_again() {
    let setup = Setup::new(Access::Public);
    setup.server.fail("model.safetensors", Fault::Cut(500_000), 1);
    setup.pull().unwrap_err();
    setup.server.fail("model.safetensors", Fault::NoRange, 1);
    setup.pull().unwrap();
    assert!(fs::read(setup.blob("")).unwrap() == weights());
}

#[test]
fn wrong_bytes_are_refused_kept_aside_and_fetched_anew() {
    let setup = Setup::new(Access::Public);
    for file in ["config.json", "model.safetensors"] {
        setup.server.fail(file, Fault::Corrupt, 1);
        match setup.pull() {
            Err(Error::Corrupt { file: told, kept, expected, found }) => {
                assert_eq!(told, file);
                assert_ne!(expected, found);
                assert!(kept.exists() && kept.ends_with(format!("{expected}.corrupt")));
                assert!(!kept.with_extension("").exists());
                assert!(!kept.with_extension("incomplete").exists());
            }
            other => panic!("{file}: {other:?}"),
        }
    }
    setup.pull().unwrap();
    assert!(fs::read(setup.blob("")).unwrap() == weights());
}

#[test]
fn bytes_of_an_earlier_attempt_that_are_wrong_are_not_built_upon() {
    let setup = Setup::new(Access::Public);
    fs::create_dir_all(setup.at("blobs")).unwrap();
    fs::write(setup.blob(".incomplete"), [7; 1000]).unwrap();
    assert!(matches!(setup.pull(), Err(Error::Corrupt { .. })));
    assert!(!setup.blob("").exists());
    // A part that is longer than the file is no part of it.
    fs::write(setup.blob(".incomplete"), vec![7; 2_000_000]).unwrap();
    setup.pull().unwrap();
    assert!(fs::read(setup.blob("")).unwrap() == weights());
}

#[test]
fn damage_in_the_cache_is_seen_by_size_always_and_by_checksum_on_request() {
    let setup = Setup::new(Access::Public);
    setup.pull().unwrap();
    fs::write(setup.blob(""), b"short").unwrap();
    let mut damaged = 0;
    let mut count =
        |event: Event<'_>| damaged += usize::from(matches!(event, Event::Damaged { .. }));
    pull(&setup.hub(None, 0), &mut count).unwrap();
    let mut other = weights();
    other[5] ^= 1;
    fs::write(setup.blob(""), &other).unwrap();
    pull(&setup.hub(None, 0), &mut count).unwrap();
    let hub = setup.hub(None, 0);
    let listing = list(&hub, NAME).unwrap();
    hub.pull(&listing, &listing.files, true, &mut count).unwrap();
    assert_eq!(damaged, 2);
    assert!(fs::read(setup.blob("")).unwrap() == weights());
    assert!(fs::read(setup.blob(".corrupt")).unwrap() == other);
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_where_it_redirects() {
    let setup = Setup::new(Access::Private);
    pull(&setup.hub(Some(HubServer::TOKEN), 0), &mut |_| {}).unwrap();
    let bearer = format!("Bearer {}", HubServer::TOKEN);
    let requests = setup.server.requests();
    assert!(requests.iter().any(|r| r.target.starts_with("/cdn/")));
    for request in requests {
        let expected = (!request.target.starts_with("/cdn/")).then_some(&bearer);
        assert_eq!(request.authorization.as_ref(), expected, "{}", request.target);
    }
}

#[test]
fn refusals_say_why_and_what_to_do() {
    let private = Setup::new(Access::Private);
    let gated = Setup::new(Access::Gated);
    let said = |result: Result<Pulled>| result.unwrap_err().to_string();

    let error = pull(&private.hub(None, 0), &mut |_| {});
    assert!(matches!(error, Err(Error::NoModel { with_token: false, .. })), "{error:?}");
    assert!(said(error).contains("HF_TOKEN"));
    let error = list(&private.hub(Some(HubServer::TOKEN), 0), "org/other");
    assert!(matches!(error, Err(Error::NoModel { with_token: true, .. })), "{error:?}");

    let error = pull(&gated.hub(None, 0), &mut |_| {});
    assert!(matches!(error, Err(Error::Gated { .. })), "{error:?}");
    assert!(said(error).contains(&format!("/{NAME}")));
    pull(&gated.hub(Some(HubServer::TOKEN), 0), &mut |_| {}).unwrap();

    let error = pull(&private.hub(Some("hf_expired"), 0), &mut |_| {});
    assert!(matches!(error, Err(Error::TokenRefused { .. })), "{error:?}");
    assert!(!said(error).contains("hf_expired"));

    let revision = "no-such".parse().unwrap();
    let error = gated.hub(None, 0).list(&NAME.parse().unwrap(), &revision);
    assert!(matches!(error, Err(Error::NoRevision { .. })), "{error:?}");
}

#[test]
fn a_hub_that_is_busy_is_asked_again_when_it_says_and_not_too_often() {
    let setup = Setup::new(Access::Public);
    setup.server.fail("/api/", Fault::Refuse(503, &[]), 1);
    setup.server.fail("/api/", Fault::Refuse(429, &[("retry-after", "0")]), 1);
    list(&setup.hub(None, 2), NAME).unwrap();
    assert_eq!(setup.server.requests().len(), 3);

    setup.server.fail("/api/", Fault::Refuse(500, &[("x-error-message", "out of order")]), 2);
    match list(&setup.hub(None, 1), NAME) {
        Err(Error::Status { status: 500, message, .. }) => assert_eq!(message, "out of order"),
        other => panic!("{other:?}"),
    }
    // Nobody waits an hour without having been asked.
    setup.server.fail("/api/", Fault::Refuse(429, &[("retry-after", "3600")]), 1);
    match list(&setup.hub(None, 9), NAME) {
        Err(Error::RateLimited { retry_after: Some(wait), .. }) => {
            assert_eq!(wait, Duration::from_secs(3600));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn nobody_at_the_other_end_is_said_at_once() {
    let setup = Setup::new(Access::Public);
    // A port of the system, which no server of another test can have.
    let nobody = "127.0.0.1:1";
    let hub = Hub::new(Options {
        endpoint: format!("http://{nobody}"),
        token: None,
        cache: Cache::new(setup.directory.path().to_owned()),
        retries: 5,
        backoff: Duration::from_secs(60),
    });
    match list(&hub.unwrap(), NAME) {
        Err(error @ Error::Unreachable { .. }) => {
            assert!(error.to_string().contains(nobody), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_in_the_cache_is_listed_without_the_hub() {
    let setup = Setup::new(Access::Public);
    let cache = Cache::new(setup.directory.path().to_owned());
    let model: ModelName = NAME.parse().unwrap();
    let none = cache.list(&model, &Revision::default());
    assert!(matches!(none, Err(Error::NotCached { .. })), "{none:?}");
    setup.pull().unwrap();
    let hub = setup.hub(None, 0);
    let (online, offline) =
        (list(&hub, NAME).unwrap(), cache.list(&model, &Revision::default()).unwrap());
    assert_eq!(offline.commit, online.commit);
    let online: Vec<_> = online.files.into_iter().filter(|f| f.path != "README.md").collect();
    if cfg!(unix) {
        assert_eq!(offline.files, online);
    }
    assert!(offline.files.iter().all(|file| cache.has(&offline, file)));
    let by_commit = cache.list(&model, &setup.commit.parse().unwrap()).unwrap();
    assert_eq!(by_commit.files, offline.files);
}

#[test]
fn what_does_not_fit_on_the_disk_is_not_begun() {
    let setup = Setup::new(Access::Public);
    let hub = setup.hub(None, 0);
    let mut listing = list(&hub, NAME).unwrap();
    for file in &mut listing.files {
        file.size = u64::MAX / 2;
    }
    match hub.pull(&listing, &listing.files, false, &mut |_| {}) {
        Err(Error::NoSpace { needed, available, .. }) => assert!(needed > available),
        other => panic!("{other:?}"),
    }
    assert!(!setup.at("blobs").exists());
}

#[test]
fn a_file_of_another_size_than_listed_is_not_taken() {
    let setup = Setup::new(Access::Public);
    let hub = setup.hub(None, 0);
    let mut listing = list(&hub, NAME).unwrap();
    for file in &mut listing.files {
        file.size += 1;
    }
    let error = hub.pull(&listing, &listing.files, false, &mut |_| {});
    assert!(matches!(error, Err(Error::Answer { .. })), "{error:?}");
}

#[test]
fn names_of_files_may_have_blanks_and_folders() {
    let setup = Setup::new(Access::Public);
    setup.server.add(NAME, Access::Public, &[("a b/ü#1-Q8_0.gguf", b"GGUF")]);
    let pulled = setup.pull().unwrap();
    assert_eq!(fs::read(pulled.directory.join("a b/ü#1-Q8_0.gguf")).unwrap(), b"GGUF");
}

#[test]
fn two_pulls_at_once_fetch_each_byte_once() {
    let setup = Setup::new(Access::Public);
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..4).map(|_| scope.spawn(|| setup.pull().unwrap())).collect();
        for pulled in pulls {
            pulled.join().unwrap();
        }
    });
    assert_eq!(setup.ranges(), [None]);
    assert!(fs::read(setup.blob("")).unwrap() == weights());
}
