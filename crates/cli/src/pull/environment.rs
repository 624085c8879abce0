//! Where the hub's tools look for token, cache and address.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use apr_hub::{DEFAULT_ENDPOINT, Token};

/// What the environment says about the hub.
#[derive(Debug)]
pub(super) struct Environment {
    pub(super) endpoint: String,
    pub(super) token: Option<Token>,
    pub(super) cache: PathBuf,
    pub(super) offline: bool,
}

impl Environment {
    /// Reads the variables that `huggingface_hub` reads; of two with the same meaning, the older comes second.
    pub(super) fn read(
        variable: impl Fn(&str) -> Option<OsString>,
        user: Option<PathBuf>,
    ) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| variable(name).map(|value| at_home(&PathBuf::from(value), &user));
        let text = |name: &str| variable(name).map(|value| value.to_string_lossy().into_owned());
        let home = path("HF_HOME").or_else(|| {
            let caches = path("XDG_CACHE_HOME").or(user.as_ref().map(|user| user.join(".cache")));
            Some(caches?.join("huggingface"))
        });
        let home = home.context("there is no home directory to keep models in; set HF_HOME")?;
        let token = text("HF_TOKEN").or(text("HUGGING_FACE_HUB_TOKEN"));
        let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let is_true = |name| {
            let value = text(name).unwrap_or_default().to_ascii_uppercase();
            matches!(value.as_str(), "1" | "ON" | "YES" | "TRUE")
        };
        Ok(Self {
            endpoint: text("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
            token: match token {
                Some(token) => Some(Token::new(&token).context("HF_TOKEN")?),
                None => token_of(&file)?,
            },
            cache: path("HF_HUB_CACHE")
                .or(path("HUGGINGFACE_HUB_CACHE"))
                .unwrap_or_else(|| home.join("hub")),
            offline: is_true("HF_HUB_OFFLINE"),
        })
    }
}

/// The token that a login left in a file, if there was one.
fn token_of(file: &Path) -> Result<Option<Token>> {
    match fs::read_to_string(file) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Ok(Some(Token::new(&text).with_context(|| file.display().to_string())?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("{} cannot be read", file.display())),
    }
}

/// The path with the user's directory for a leading `~`.
fn at_home(path: &Path, user: &Option<PathBuf>) -> PathBuf {
    match (path.strip_prefix("~"), user) {
        (Ok(rest), Some(user)) => user.join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)], user: Option<&Path>) -> Result<Environment> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(given, _)| *given == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Environment::read(variable, user.map(Path::to_owned))
    }

    #[test]
    fn the_cache_is_where_the_hubs_own_tools_have_it() {
        let user = Some(Path::new("/u"));
        for (variables, expected) in [
            (&[][..], "/u/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "~/h"), ("XDG_CACHE_HOME", "/x")], "/u/h/hub"),
            (&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/d")], "/c"),
            (&[("HUGGINGFACE_HUB_CACHE", "/d")], "/d"),
            (&[("HF_HUB_CACHE", "")], "/u/.cache/huggingface/hub"),
        ] {
            let cache = read(variables, user).unwrap().cache;
            assert_eq!(cache, Path::new(expected), "{variables:?}");
        }
        assert!(read(&[], None).unwrap_err().to_string().contains("HF_HOME"));
    }

    #[test]
    fn a_token_comes_from_the_variable_or_from_the_file_of_a_login() {
        let home = tempfile::tempdir().unwrap();
        let at = home.path().to_str().unwrap();
        assert!(read(&[("HF_HOME", at)], None).unwrap().token.is_none());
        assert!(read(&[("HF_HOME", at), ("HF_TOKEN", "hf_x")], None).unwrap().token.is_some());
        fs::write(home.path().join("token"), "hf_secret in two words").unwrap();
        let error = format!("{:#}", read(&[("HF_HOME", at)], None).unwrap_err());
        assert!(error.contains("token") && !error.contains("secret"), "{error}");
        fs::write(home.path().join("token"), "hf_x\n").unwrap();
        assert!(read(&[("HF_HOME", at)], None).unwrap().token.is_some());
    }

    #[test]
    fn offline_is_what_python_takes_for_true() {
        let offline =
            |value| read(&[("HF_HUB_OFFLINE", value)], Some(Path::new("/u"))).unwrap().offline;
        assert!(offline("1") && offline("yes") && !offline("0") && !offline(""));
    }
}
