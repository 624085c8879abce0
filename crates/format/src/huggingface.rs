//! Hugging Face checkpoints: a directory of safetensors, `config.json`, and what belongs to them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path},
};

use apr_tensor::Bytes;

use crate::{
    Error, File, Map, Metadata, Place, Result, Value,
    budget::Budget,
    json, safetensors,
    sniff::{Kind, sniff},
    tensors::{Data, Tensors},
};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How the name of an index of shards ends.
pub(crate) const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The other files of a Hugging Face directory; each of them may be absent.
#[derive(Clone, Debug, Default)]
pub struct Companions {
    /// `tokenizer.json`
    pub tokenizer: Option<File>,
    /// `tokenizer_config.json`
    pub tokenizer_config: Option<File>,
    /// `special_tokens_map.json`
    pub special_tokens_map: Option<File>,
    /// `generation_config.json`
    pub generation_config: Option<File>,
    /// `chat_template.jinja`
    pub chat_template: Option<File>,
}

/// Where the files of a model are.
#[derive(Clone, Copy)]
enum Directory<'a> {
    OnDisk(&'a Path),
    InMemory(&'a Path, &'a [(String, Bytes)]),
}

impl Directory<'_> {
    fn open(self, name: &str) -> Result<Option<File>> {
        match self {
            Self::OnDisk(path) => File::open_if_present(path.join(name)),
            Self::InMemory(path, files) => {
                let bytes = files.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.clone());
                Ok(bytes.map(|bytes| File::from_bytes(path.join(name), bytes)))
            }
        }
    }
}

impl Companions {
    fn beside(directory: Directory<'_>) -> Result<Self> {
        let open = |name| directory.open(name);
        Ok(Self {
            tokenizer: open("tokenizer.json")?,
            tokenizer_config: open("tokenizer_config.json")?,
            special_tokens_map: open("special_tokens_map.json")?,
            generation_config: open("generation_config.json")?,
            chat_template: open("chat_template.jinja")?,
        })
    }
}

/// What is in a Hugging Face checkpoint.
pub(crate) struct Contents {
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Tensors,
    pub(crate) files: Vec<File>,
    pub(crate) companions: Companions,
}

/// Opens a directory with `config.json`; as `transformers` does, `model.safetensors` goes before an index
/// of shards.
pub(crate) fn open_directory(directory: &Path) -> Result<Contents> {
    if !directory.join(CONFIG).is_file() {
        return Err(Error::Directory {
            directory: directory.to_owned(),
            expected: format!("a Hugging Face model with {CONFIG}"),
            found: listing(directory)?,
            help: "give the directory of the model, or the path of a GGUF, safetensors or .apr file",
        });
    }
    if let Some(single) = File::open_if_present(directory.join(SINGLE))? {
        if sniff(&single)? != Kind::Safetensors {
            return Err(no_safetensors(&single));
        }
        return open_single(single);
    }
    match File::open_if_present(directory.join(INDEX))? {
        Some(index) => open_sharded(&index),
        None => Err(Error::Directory {
            directory: directory.to_owned(),
            expected: format!("{SINGLE} or {INDEX}"),
            found: listing(directory)?,
            help: "download the safetensors files of the model; other weight formats must be converted",
        }),
    }
}

/// Opens one safetensors file, with the `config.json` beside it if there is one.
pub(crate) fn open_single(file: File) -> Result<Contents> {
    let directory = parent(file.path()).to_owned();
    read_single(file, Some(Directory::OnDisk(&directory)))
}

/// As `open_single`, for a file that is in no directory.
pub(crate) fn from_memory(file: File) -> Result<Contents> {
    read_single(file, None)
}

/// As `open_single`, for a directory that is in memory.
pub(crate) fn from_files(directory: &Path, files: &[(String, Bytes)]) -> Result<Contents> {
    let directory = Directory::InMemory(directory, files);
    match directory.open(SINGLE)? {
        Some(file) => read_single(file, Some(directory)),
        None => Err(Error::NotAModel {
            file: SINGLE.into(),
            found: "no such file in memory",
            help: "give the tensors as well",
        }),
    }
}

fn read_single(file: File, directory: Option<Directory<'_>>) -> Result<Contents> {
    let mut budget = Budget::new(file.path(), file.size());
    let safetensors::Contents { metadata: texts, entries, data } =
        safetensors::read(&file, &mut budget)?;
    let mut tensors = Tensors::default();
    tensors.add(&file, entries, Data { start: data, alignment: 1, footer: 0 })?;
    let (metadata, companions) = surroundings(directory, file.path(), texts, &mut budget)?;
    Ok(Contents { metadata, tensors, files: vec![file], companions })
}

/// Opens the shards that `index` lists, each tensor in the file that the index says.
pub(crate) fn open_sharded(index: &File) -> Result<Contents> {
    let directory = parent(index.path());
    let mut budget =
        Budget::new(index.path(), index.size().saturating_add(shards_size(directory)?));
    let map = WeightMap::read(index, &mut budget)?;
    let names = map.shards();
    check_presence(directory, &names)?;
    let mut tensors = Tensors::default();
    let mut files = Vec::new();
    let mut texts = Map::default();
    for name in names {
        let shard = File::open(directory.join(name))?;
        if sniff(&shard)? != Kind::Safetensors {
            return Err(no_safetensors(&shard));
        }
        budget.go_on(shard.path());
        let contents = safetensors::read(&shard, &mut budget)?;
        for entry in &contents.entries {
            map.check_home(index, &entry.name, name)?;
        }
        let data = Data { start: contents.data, alignment: 1, footer: 0 };
        tensors.add(&shard, contents.entries, data)?;
        if texts.is_empty() {
            texts = contents.metadata;
        }
        files.push(shard);
    }
    map.check_complete(index, &tensors)?;
    let (metadata, companions) =
        surroundings(Some(Directory::OnDisk(directory)), index.path(), texts, &mut budget)?;
    Ok(Contents { metadata, tensors, files, companions })
}

/// `config.json` and what else is in `directory`; without a `config.json` its other files belong to nothing.
///
/// The texts of the safetensors header are kept apart, under their own key. Without a `config.json`, `home`
/// is the file that the metadata is from.
fn surroundings(
    directory: Option<Directory<'_>>,
    home: &Path,
    texts: Map,
    budget: &mut Budget,
) -> Result<(Metadata, Companions)> {
    let config = match directory {
        Some(directory) => directory.open(CONFIG)?.zip(Some(directory)),
        None => None,
    };
    let (home, mut map, companions) = match &config {
        Some((config, directory)) => {
            budget.add_file(config.path(), config.size());
            let map = json::parse_object(config.path(), 0, config.bytes(), budget)?;
            (config.path(), map, Companions::beside(*directory)?)
        }
        None => (home, Map::default(), Companions::default()),
    };
    if !texts.is_empty() {
        map.insert(safetensors::METADATA_KEY, texts);
    }
    Ok((Metadata::new(home, map), companions))
}

/// The size of all safetensors files in `directory`, which is what an index of them may be large for.
fn shards_size(directory: &Path) -> Result<u64> {
    let error = |reason| Error::Io { file: directory.to_owned(), reason };
    let mut size = 0u64;
    for entry in fs::read_dir(directory).map_err(error)? {
        let path = entry.map_err(error)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            // A link to a shard counts with the size of the shard; one to nothing is missed later.
            size = size.saturating_add(fs::metadata(path).map_or(0, |metadata| metadata.len()));
        }
    }
    Ok(size)
}

/// All shards must be there; an interrupted download is the usual reason that they are not.
fn check_presence(directory: &Path, shards: &BTreeSet<&str>) -> Result<()> {
    let missing: Vec<_> =
        shards.iter().copied().filter(|name| !directory.join(name).is_file()).collect();
    let Some(first) = missing.first() else { return Ok(()) };
    Err(Error::Directory {
        directory: directory.to_owned(),
        expected: format!("the {} shards of the index", shards.len()),
        found: format!("{} of them missing, the first is {first}", missing.len()),
        help: "complete the download",
    })
}

/// The `weight_map` of an index: the file of each tensor.
struct WeightMap(Map);

impl WeightMap {
    const KEY: &str = "weight_map";

    fn read(index: &File, budget: &mut Budget) -> Result<Self> {
        let malformed = |key: &str, expected: &str, found: String| Error::Malformed {
            file: index.path().to_owned(),
            at: Place::Key(key.to_owned()),
            expected: expected.to_owned(),
            found,
        };
        let map =
            match json::parse_object(index.path(), 0, index.bytes(), budget)?.remove(Self::KEY) {
                Some(Value::Object(map)) => map,
                Some(other) => return Err(malformed(Self::KEY, "an object", other.to_string())),
                None => return Err(malformed(Self::KEY, "an object", "no such key".to_owned())),
            };
        for (tensor, file) in map.iter() {
            let name = file.as_str().filter(|name| is_plain_name(name));
            if name.is_none() {
                return Err(malformed(
                    tensor,
                    "the name of a file in the same directory",
                    file.to_string(),
                ));
            }
        }
        Ok(Self(map))
    }

    /// The files, sorted by name.
    fn shards(&self) -> BTreeSet<&str> {
        self.0.iter().filter_map(|(_, file)| file.as_str()).collect()
    }

    fn check_home(&self, index: &File, tensor: &str, shard: &str) -> Result<()> {
        let home = self.0.get(tensor).and_then(Value::as_str);
        if home == Some(shard) {
            return Ok(());
        }
        Err(Error::Malformed {
            file: index.path().to_owned(),
            at: Place::Tensor(tensor.to_owned()),
            expected: match home {
                Some(home) => format!("the tensor in {home} only"),
                None => format!("the tensor in {}, because {shard} has it", Self::KEY),
            },
            found: match home {
                Some(_) => format!("it in {shard}"),
                None => "no such key".to_owned(),
            },
        })
    }

    fn check_complete(&self, index: &File, tensors: &Tensors) -> Result<()> {
        let missing = self.0.iter().find(|(name, _)| !tensors.contains(name));
        missing.map_or(Ok(()), |(tensor, file)| {
            Err(Error::Malformed {
                file: index.path().to_owned(),
                at: Place::Tensor(tensor.to_owned()),
                expected: format!("the tensor in {}", file.as_str().unwrap_or_default()),
                found: "no such tensor there".to_owned(),
            })
        })
    }
}

/// Whether `name` is one plain component: it cannot lead out of the directory.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', '\0'])
}

fn no_safetensors(file: &File) -> Error {
    Error::NotAModel {
        file: file.path().to_owned(),
        found: "another kind of file under the name of a safetensors file",
        help: "open that file by its own path, or download the model again",
    }
}

fn parent(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The first few names in a directory, for a message.
fn listing(directory: &Path) -> Result<String> {
    const SHOWN: usize = 8;
    let error = |reason| Error::Io { file: directory.to_owned(), reason };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory).map_err(error)? {
        names.insert(entry.map_err(error)?.file_name().to_string_lossy().into_owned());
    }
    let more = names.len().saturating_sub(SHOWN);
    let shown: Vec<_> = names.into_iter().take(SHOWN).collect();
    Ok(match (shown.as_slice(), more) {
        ([], _) => "an empty directory".to_owned(),
        (names, 0) => names.join(", "),
        (names, more) => format!("{} and {more} more", names.join(", ")),
    })
}
