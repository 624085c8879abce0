use serde_json::{Value, json};

use crate::{Case, tiny};

/// Says where `value` is not what `schema` allows. Of JSON Schema it knows what the published schema uses, and nothing else
/// passes for known.
fn check(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    for (keyword, rule) in schema.as_object().expect("a schema is an object") {
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" => {}
            "$ref" => {
                let pointer = rule.as_str().unwrap().strip_prefix('#').unwrap();
                let rule = root.pointer(pointer).unwrap_or_else(|| panic!("no {pointer}"));
                check(root, rule, value, at)?;
            }
            "type" => {
                let is = |name: &str| match name {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "number" => value.is_number(),
                    "integer" => value.is_u64(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    other => panic!("unknown type {other}"),
                };
                let allowed = match rule {
                    Value::Array(names) => names.iter().any(|name| is(name.as_str().unwrap())),
                    name => is(name.as_str().unwrap()),
                };
                if !allowed {
                    return Err(format!("{at}: {value} is no {rule}"));
                }
            }
            "const" if rule == value => {}
            "enum" if rule.as_array().unwrap().contains(value) => {}
            "const" | "enum" => return Err(format!("{at}: {value} is not {rule}")),
            "anyOf" => {
                let tried =
                    rule.as_array().unwrap().iter().map(|rule| check(root, rule, value, at));
                let errors: Vec<String> = tried.filter_map(Result::err).collect();
                if errors.len() == rule.as_array().unwrap().len() {
                    return Err(errors.join("; or "));
                }
            }
            "items" if value.is_array() => {
                for (i, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(root, rule, item, &format!("{at}/{i}"))?;
                }
            }
            "items" => {}
            "required" if value.is_null() => {}
            "required" => {
                for key in rule.as_array().unwrap() {
                    if value.get(key.as_str().unwrap()).is_none() {
                        return Err(format!("{at}: {key} is missing"));
                    }
                }
            }
            "additionalProperties" => {
                assert_eq!(*rule, json!(false));
                let known = schema["properties"].as_object().unwrap();
                let mut keys = value.as_object().into_iter().flat_map(|object| object.keys());
                if let Some(key) = keys.find(|key| !known.contains_key(*key)) {
                    return Err(format!("{at}: `{key}` is not in the schema"));
                }
            }
            "properties" => {
                for (key, rule) in rule.as_object().unwrap() {
                    if let Some(value) = value.get(key) {
                        check(root, rule, value, &format!("{at}/{key}"))?;
                    }
                }
            }
            other => panic!("{at}: the checker does not know `{other}`"),
        }
    }
    Ok(())
}

fn schema() -> Value {
    published("audit")
}

fn published(name: &str) -> Value {
    let schemas = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/schemas");
    let text = std::fs::read_to_string(format!("{schemas}/{name}.schema.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Fails unless `value` is what the schema called `name` says.
pub(crate) fn assert_published(name: &str, value: &Value) {
    let schema = published(name);
    check(&schema, &schema, value, "").unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn json_is_what_the_published_schema_says() {
    let schema = schema();
    let nothing = Case::of(
        &apr_testkit::fixture("golden/tiny-qwen2/capture/step-0000.safetensors"),
        &tiny(),
        true,
    );
    for case in [Case::right(), Case::wrong(), nothing] {
        let json = serde_json::to_value(case.report()).unwrap();
        check(&schema, &schema, &json, "").unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn json_that_is_something_else_is_not_let_through() {
    let schema = schema();
    let sound = serde_json::to_value(Case::wrong().report()).unwrap();
    let damage: [(&str, Value); 5] = [
        ("/schema", json!("apr-audit/0")),
        ("/tokens", json!(-1)),
        ("/verdict/verdict", json!("perhaps")),
        ("/stages/0/local", json!("large")),
        ("/stages/0/worst/group", json!({ "row": {} })),
    ];
    for (at, value) in damage {
        let mut json = sound.clone();
        *json.pointer_mut(at).unwrap() = value;
        assert!(check(&schema, &schema, &json, "").is_err(), "{at}");
    }
    let mut more = sound;
    more["opinion"] = json!("good");
    assert!(check(&schema, &schema, &more, "").is_err(), "a key that nobody documented");
}
