//! Chat templates: from messages to the text that a model was trained on.
//!
//! Templates are Jinja programs written for Hugging Face's Python renderer. This renders them as
//! that does: same whitespace rules, same extra functions, Python's string methods and JSON.

mod clock;
mod json;

use std::panic::catch_unwind;

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
        let fail = |line, detail| Error::Template { file: self.file.clone(), line, detail };
        // The engine indexes out of bounds on some templates; a file must not end the program.
        let rendered = catch_unwind(|| self.try_render(messages, add_generation_prompt))
            .map_err(|_| fail(None, "the template engine fails on this template".to_owned()))?;
        rendered.map_err(|e| {
            let what = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
            let detail = match e.kind() {
                ErrorKind::InvalidOperation | ErrorKind::SyntaxError => what,
                kind => format!("{kind}: {what}"),
            };
            fail(e.line(), detail)
        })
    }

    fn try_render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, minijinja::Error> {
        let mut environment = environment()?;
        environment.add_template_owned("chat", in_our_dialect(&self.source))?;
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

/// More than a conversation of ten thousand messages takes, and an end to nested loops.
const MAX_STEPS: u64 = 10_000_000;

fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    let whitespace = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(whitespace);
    environment.set_fuel(Some(MAX_STEPS));
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
    // Python's lengths and loops take nothing for empty, but None for an error.
    environment.add_filter("length", |value: &Value| match value.len() {
        None if value.is_undefined() => Ok(0),
        None => Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("a value of type {} has no length", value.kind()),
        )),
        Some(length) => Ok(length),
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_filter("tojson", |value: Value, options: Kwargs| {
        let indent: Option<usize> = options.get("indent")?;
        // The separators and sorting that templates ask for are what Python does anyway.
        json::to_python_json(&value, indent)
    });
    Ok(environment)
}

/// The template with what only Hugging Face's renderer understands put in other words.
///
/// - `{% generation %}` marks what to train on and prints nothing: it becomes a condition that
///   holds, with the same whitespace control.
/// - `[::-1]` becomes `|reverse`, because the engine's own way to step backwards fails on an empty
///   list, such as the messages after a lone system message.
fn in_our_dialect(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%").into_iter().chain(rest.find("{{")).min() {
        let end = if rest[start..].starts_with("{%") { "%}" } else { "}}" };
        // Not before the brace is over: `{%}` ends nothing.
        let Some(length) = rest[start + 2..].find(end) else { break };
        let (tag, after) = rest[start..].split_at(length + 4);
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        out.push_str(&rest[..start]);
        match (end, inner) {
            ("%}", "generation") => out.push_str(&tag.replace("generation", "if true")),
            ("%}", "endgeneration") => out.push_str(&tag.replace("endgeneration", "endif")),
            // A filter cannot be followed by a subscript.
            _ => out.push_str(&tag.replace("[::-1]", "|reverse").replace("|reverse[", "[::-1][")),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
