//! Chat templates: from messages to the text that a model was trained on.
//!
//! Templates are Jinja programs written for Hugging Face's Python renderer. This renders them as
//! that does: same whitespace rules, same extra functions, Python's string methods and JSON.

mod clock;
mod json;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};

use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`.
    pub role: String,
    /// What they say.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model's chat template. It is compiled when it is rendered: a model whose template is broken
/// still runs on plain text.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    file: String,
    source: String,
    /// Special tokens by the names that templates know them by.
    variables: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    pub(crate) fn new(
        file: &str,
        source: &str,
        variables: impl IntoIterator<Item = (&'static str, Option<String>)>,
    ) -> Self {
        let variables =
            variables.into_iter().filter_map(|(name, token)| Some((name, token?))).collect();
        Self { file: file.to_owned(), source: source.to_owned(), variables }
    }

    /// The template as the model ships it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation. With `add_generation_prompt` it ends where the assistant
    /// speaks next.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.try_render(messages, add_generation_prompt).map_err(|e| {
            let what = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
            let detail = match e.kind() {
                ErrorKind::InvalidOperation | ErrorKind::SyntaxError => what,
                kind => format!("{kind}: {what}"),
            };
            Error::Template { file: self.file.clone(), line: e.line(), detail }
        })
    }

    fn try_render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, minijinja::Error> {
        let mut environment = environment()?;
        environment.add_template_owned("chat", without_generation_tags(&self.source))?;
        let variables = Value::from_pairs(self.variables.iter().cloned());
        let message = |m: &Message| {
            Value::from_pairs([("role", m.role.clone()), ("content", m.content.clone())])
        };
        environment.get_template("chat")?.render(context! {
            messages => messages.iter().map(message).collect::<Vec<_>>(),
            add_generation_prompt,
            tools => (),
            documents => (),
            ..variables
        })
    }
}

fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    let whitespace = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(whitespace);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: &str| {
        clock::now().format(format).map_err(|directive| {
            let detail = format!("strftime_now: %{directive} is not supported");
            minijinja::Error::new(ErrorKind::InvalidOperation, detail)
        })
    });
    environment.add_filter("tojson", |value: Value, options: Kwargs| {
        let indent: Option<usize> = options.get("indent")?;
        // The separators and sorting that templates ask for are what Python does anyway.
        json::to_python_json(&value, indent)
    });
    Ok(environment)
}

/// Hugging Face's renderer knows `{% generation %}`, which marks what to train on and prints
/// nothing. Here it becomes a condition that holds, with the same whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (tag, after) = (&rest[start..start + length + 2], &rest[start + length + 2..]);
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        out.push_str(&rest[..start]);
        match inner {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
