//! Reading `.apr`.

use std::iter;

use apr_tensor::{DType, Shape};

use super::{
    ALIASES, ALIGNMENT, DTYPES, FOOTER_LEN, HEADER_CRC, HEADER_LEN, MAGIC, MAJOR, MAX_METADATA,
    MAX_NAME,
};
use crate::{
    Checksum, Error, File, Metadata, Place, Result,
    budget::Budget,
    cursor::Cursor,
    error::Shortened,
    json,
    tensors::{self, Data, Entry, Kind, MAX_DIMS, Tensors},
};

/// The least that an index entry takes: name length, type, dimension count, offset, size.
const MIN_ENTRY: u64 = 2 + 1 + 1 + 8 + 8;

/// Flags that change what the bytes mean, what they are called, and what to do.
const REFUSED_FLAGS: &[(u16, &str, &str)] = &[
    (0x1, "LZ4 compression", "write the file again without compression"),
    (0x2, "ZSTD compression", "write the file again without compression"),
    (0x4, "encryption", "decrypt the file first"),
    (0x10, "sharding", "merge the shards into one file, or open the model that it was made from"),
    (0x800, "the column-major layout", "write the file again in row-major layout"),
    (
        0xf000,
        "an unknown flag",
        "use a newer version of this program, or open the model that it was made from",
    ),
];

/// What is in an `.apr` file.
pub(crate) struct Contents {
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Tensors,
}

/// Reads the header, the metadata and the index. A header whose checksum is wrong is refused, or believed if it `may_be_damaged`.
pub(crate) fn read(file: &File, budget: &mut Budget, may_be_damaged: bool) -> Result<Contents> {
    let header = Header::read(file, may_be_damaged)?;
    let text = header.metadata(file)?;
    let map = json::parse_object(file.path(), header.metadata_offset, text, budget)?;
    let metadata = Metadata::with_aliases(file.path(), map, ALIASES)?;
    let entries = header.entries(file, budget)?;
    let mut tensors = Tensors::default();
    let start = header.data_offset;
    tensors.add(file, entries, Data { start, alignment: ALIGNMENT, footer: FOOTER_LEN })?;
    Ok(Contents { metadata, tensors })
}

/// The checksums of a file that was read: of the header, and of everything.
pub(crate) fn checksums(file: &File) -> [Checksum; 2] {
    let end = file.bytes().len() - FOOTER_LEN as usize;
    [header_checksum(file), Checksum::of(file, "the file", end, iter::once(0..end))]
}

fn header_checksum(file: &File) -> Checksum {
    let ranges = [0..HEADER_CRC.start, HEADER_CRC.end..HEADER_LEN as usize];
    Checksum::of(file, "the header", HEADER_CRC.start, ranges)
}

struct Header {
    tensor_count: u32,
    metadata_offset: u64,
    metadata_size: u32,
    index_offset: u64,
    data_offset: u64,
}

impl Header {
    fn read(file: &File, may_be_damaged: bool) -> Result<Self> {
        let mut cursor = Cursor::new(file.path(), file.bytes(), 0);
        Cursor::new(file.path(), file.bytes(), 0).take(HEADER_LEN, "the header")?;
        let magic = cursor.array::<4>("the magic number")?;
        assert_eq!(&magic, MAGIC, "the caller has looked at the magic number");
        let unsupported = |at, what: String, help| Error::Unsupported {
            file: file.path().to_owned(),
            at: Place::Offset(at),
            what,
            help,
        };
        let (major, minor) = (cursor.u8("the version")?, cursor.u8("the version")?);
        if major != MAJOR {
            let what = format!(".apr version {major}.{minor}");
            return Err(unsupported(4, what, "convert the original model to .apr version 2"));
        }
        let checksum = header_checksum(file);
        let (stated, computed) = (checksum.stated, checksum.compute(|_| ()));
        if stated != computed && !may_be_damaged {
            return Err(cursor.malformed_at(
                checksum.at,
                format!("the header's checksum {computed:#010x}"),
                format!("{stated:#010x}; the header is damaged, copy or download the file again"),
            ));
        }
        let flags = cursor.u16("the flags")?;
        if let Some((_, what, help)) = REFUSED_FLAGS.iter().find(|(flag, ..)| flags & flag != 0) {
            return Err(unsupported(6, format!("{what} (flags {flags:#06x})"), help));
        }
        let header = Self {
            tensor_count: cursor.u32("the number of tensors")?,
            metadata_offset: cursor.u64("the offset of the metadata")?,
            metadata_size: cursor.u32("the size of the metadata")?,
            index_offset: cursor.u64("the offset of the tensor index")?,
            data_offset: cursor.u64("the offset of the data")?,
        };
        header.check_sections(file, &cursor)?;
        Ok(header)
    }

    /// The sections must follow one another, each on a multiple of 64, all of them before the footer.
    fn check_sections(&self, file: &File, cursor: &Cursor<'_>) -> Result<()> {
        if self.metadata_size > MAX_METADATA {
            return Err(Error::Limit {
                file: file.path().to_owned(),
                at: Place::Offset(20),
                what: "the size of the metadata",
                found: self.metadata_size.into(),
                limit: MAX_METADATA.into(),
            });
        }
        let metadata_end = self.metadata_offset.saturating_add(self.metadata_size.into());
        for (at, offset, least, what) in [
            (12, self.metadata_offset, HEADER_LEN, "metadata"),
            (24, self.index_offset, metadata_end, "tensor index"),
            (32, self.data_offset, self.index_offset, "data"),
        ] {
            if offset < least || !offset.is_multiple_of(ALIGNMENT) {
                let expected =
                    format!("a multiple of {ALIGNMENT} from {least} on as offset of the {what}");
                return Err(cursor.malformed_at(at, expected, offset.to_string()));
            }
            let end = offset.saturating_add(FOOTER_LEN);
            if end > file.size() {
                return Err(Error::Truncated {
                    file: file.path().to_owned(),
                    at: Place::Offset(at),
                    what: format!("the section {what}"),
                    start: offset,
                    end,
                    len: file.size(),
                });
            }
        }
        Ok(())
    }

    fn metadata<'a>(&self, file: &'a File) -> Result<&'a [u8]> {
        let at = usize::try_from(self.metadata_offset).expect("check_sections: within the file");
        Cursor::new(file.path(), file.bytes(), at).take(self.metadata_size.into(), "the metadata")
    }

    fn entries(&self, file: &File, budget: &mut Budget) -> Result<Vec<Entry>> {
        let index = &file.bytes()[..usize::try_from(self.data_offset).expect("within the file")];
        let at = usize::try_from(self.index_offset).expect("check_sections: before the data");
        let mut cursor = Cursor::new(file.path(), index, at);
        cursor.check_count(8, self.tensor_count.into(), MIN_ENTRY, "tensors")?;
        let bytes = (self.tensor_count as usize).saturating_mul(tensors::ENTRY_COST);
        budget.charge(bytes, || Place::Offset(8))?;
        let mut entries: Vec<Entry> = Vec::with_capacity(self.tensor_count as usize);
        for _ in 0..self.tensor_count {
            let at = cursor.offset();
            let entry = self.entry(file, &mut cursor, budget)?;
            if let Some(before) = entries.last()
                && before.name >= entry.name
            {
                let expected =
                    format!("names in ascending order, after `{}`", Shortened(&before.name));
                return Err(cursor.malformed_at(
                    at,
                    expected,
                    format!("tensor `{}`", Shortened(&entry.name)),
                ));
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    fn entry(&self, file: &File, cursor: &mut Cursor<'_>, budget: &mut Budget) -> Result<Entry> {
        let at = cursor.offset();
        let len = cursor.u16("the length of a tensor name")?;
        if len > MAX_NAME {
            let expected = format!("a tensor name of at most {MAX_NAME} bytes");
            return Err(cursor.malformed_at(at, expected, format!("{len} bytes")));
        }
        let name = cursor.text(len.into(), "a tensor name")?.to_owned();
        budget.charge(tensors::name_cost(&name), || Place::Tensor(name.clone()))?;

        let what = format_args!("the index entry of tensor `{}`", Shortened(&name));
        let id = cursor.u8(what)?;
        let at = cursor.offset();
        let ndim = usize::from(cursor.u8(what)?);
        if ndim > MAX_DIMS {
            let expected =
                format!("at most {MAX_DIMS} dimensions of tensor `{}`", Shortened(&name));
            return Err(cursor.malformed_at(at, expected, ndim.to_string()));
        }
        let mut dims = Vec::with_capacity(ndim);
        for _ in 0..ndim {
            let at = cursor.offset();
            let dim = cursor.u64(what)?;
            dims.push(usize::try_from(dim).map_err(|_| {
                cursor.malformed_at(at, "a dimension that memory can hold", dim.to_string())
            })?);
        }
        let shape = Shape::new(dims);

        let at = cursor.offset();
        let offset = cursor.u64(what)?;
        if !offset.is_multiple_of(ALIGNMENT) {
            let expected =
                format!("a multiple of {ALIGNMENT} as offset of tensor `{}`", Shortened(&name));
            return Err(cursor.malformed_at(at, expected, offset.to_string()));
        }
        let at = cursor.offset();
        let len = cursor.u64(what)?;
        let kind = match dtype_numbered(id) {
            Some(dtype) => {
                let expected = Entry::size_of(file.path(), &name, dtype, &shape)?;
                if expected != len {
                    let expected = format!(
                        "{expected} bytes for {dtype} {shape} of tensor `{}`",
                        Shortened(&name)
                    );
                    return Err(cursor.malformed_at(at, expected, len.to_string()));
                }
                Kind::Known { dtype, bytes: len }
            }
            None => Kind::Unknown { dtype: format!("apr-{id}"), bytes: Some(len) },
        };
        Ok(Entry { name, kind, shape, start: offset.saturating_add(self.data_offset) })
    }
}

fn dtype_numbered(id: u8) -> Option<DType> {
    DTYPES.iter().find(|row| row.0 == id).map(|row| row.1)
}
