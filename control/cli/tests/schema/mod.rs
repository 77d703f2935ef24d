//! Documents against the schemas that we ship.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// Panics where the document is not as the schema of this file says.
pub(crate) fn check(document: &Value, file: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema").join(file);
    let schema: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    conforms(document, &schema, file);
}

/// Whether a document has what a schema requires, of the types it says. Enough of JSON Schema for
/// the schema that we ship.
fn conforms(value: &Value, schema: &Value, at: &str) {
    if let Some(expected) = schema.get("const") {
        assert_eq!(value, expected, "{at}");
    }
    if let Some(choices) = schema.get("enum").and_then(Value::as_array) {
        assert!(choices.contains(value), "{at}: {value}");
    }
    if let Some(types) = schema.get("type") {
        let is = |name: &Value| match name.as_str().unwrap() {
            "array" => value.is_array(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_u64(),
            "number" => value.is_number(),
            "null" => value.is_null(),
            "object" => value.is_object(),
            "string" => value.is_string(),
            other => panic!("{at}: the schema has the type {other}"),
        };
        let fits = types.as_array().map_or_else(|| is(types), |types| types.iter().any(is));
        assert!(fits, "{at}: {value} is no {types}");
    }
    for key in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
        let key = key.as_str().unwrap();
        assert!(value.get(key).is_some(), "{at} has no {key}");
    }
    for (key, schema) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        if let Some(value) = value.get(key) {
            conforms(value, schema, &format!("{at}.{key}"));
        }
    }
    for (key, _) in value.as_object().into_iter().flatten() {
        let known = schema.get("properties").and_then(|known| known.get(key)).is_some();
        assert!(known, "{at}.{key} is not in the schema");
    }
    if let (Some(items), Some(schema)) = (value.as_array(), schema.get("items")) {
        for (number, item) in items.iter().enumerate() {
            conforms(item, schema, &format!("{at}[{number}]"));
        }
    }
}
