//! Requests, answers and errors of the control socket.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The longest request line, in bytes, its newline not counted.
pub const LINE_MAX_BYTES: usize = 64 << 10;
/// The most clients at a time.
pub const CLIENTS_MAX: usize = 32;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The command.
    pub execute: String,
    /// Its arguments.
    #[serde(default = "no_arguments")]
    pub arguments: Value,
    /// Comes back with the answer, whatever it is.
    #[serde(default)]
    pub id: Option<Value>,
}

fn no_arguments() -> Value {
    json!({})
}

/// Kinds of errors, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorClass {
    /// The line is no request: too long, not JSON, not of the shape.
    InvalidRequest,
    /// There is no such command.
    UnknownCommand,
    /// The arguments do not fit the command.
    InvalidArguments,
    /// It does not fit what the daemon is doing now.
    Refused,
    /// It was tried and failed.
    Failed,
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct ApiError {
    /// For programs.
    pub class: ErrorClass,
    /// For people: what happened and what to do.
    pub desc: String,
}

impl ApiError {
    /// An error of a class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self { class, desc: desc.into() }
    }

    /// It does not fit what the daemon is doing now.
    pub fn refused(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::Refused, desc)
    }

    /// It was tried and failed.
    pub fn failed(desc: impl std::fmt::Display) -> Self {
        Self::new(ErrorClass::Failed, desc.to_string())
    }
}

/// A line as a request, or why it is none; the `id` comes along where it could be made out.
///
/// # Errors
/// [`ErrorClass::InvalidRequest`].
pub fn parse_request(line: &[u8]) -> Result<Request, (ApiError, Option<Value>)> {
    let invalid = |desc: String| ApiError::new(ErrorClass::InvalidRequest, desc);
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| (invalid(format!("the line is not JSON: {error}")), None))?;
    let id = value.get("id").cloned();
    let request: Request = serde_json::from_value(value).map_err(|error| {
        let form = r#"{"execute": COMMAND, "arguments": {…}, "id": …}"#;
        (invalid(format!("the line is not a request ({error}); its form is {form}")), id.clone())
    })?;
    if request.arguments.is_object() {
        Ok(request)
    } else {
        Err((invalid("arguments are an object".into()), id))
    }
}

/// The line that answers a request, with its newline.
pub fn answer(result: Result<Value, ApiError>, id: Option<Value>) -> Vec<u8> {
    let mut answer = match result {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": error }),
    };
    if let Some(id) = id {
        answer["id"] = id;
    }
    let mut line = answer.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_needs_a_command_only() {
        let request = parse_request(br#"{"execute":"status"}"#).unwrap();
        assert_eq!(request, Request { execute: "status".into(), arguments: json!({}), id: None });
        let request = parse_request(br#"{"execute":"x","arguments":{"a":1},"id":[7]}"#).unwrap();
        assert_eq!((request.arguments, request.id), (json!({"a": 1}), Some(json!([7]))));
    }

    #[test]
    fn what_is_no_request_is_an_error_and_keeps_its_id() {
        let nested = "[".repeat(100_000);
        for line in ["", "{", "null", "7", "[]", "\u{0}\u{1}", nested.as_str()] {
            let (error, id) = parse_request(line.as_bytes()).unwrap_err();
            assert_eq!((error.class, id), (ErrorClass::InvalidRequest, None), "{line:.20}");
        }
        assert!(parse_request(b"\xff\xfe{}").is_err());
        for line in [
            r#"{"id":3}"#,
            r#"{"execute":5,"id":3}"#,
            r#"{"execute":"a","arguments":[],"id":3}"#,
            r#"{"execute":"a","other":1,"id":3}"#,
        ] {
            let (error, id) = parse_request(line.as_bytes()).unwrap_err();
            assert_eq!((error.class, id), (ErrorClass::InvalidRequest, Some(json!(3))), "{line}");
        }
    }

    #[test]
    fn an_answer_is_one_line() {
        let line = answer(Ok(json!({"a": "x\ny"})), Some(json!(1)));
        assert_eq!(line, b"{\"id\":1,\"return\":{\"a\":\"x\\ny\"}}\n");
        let line = answer(Err(ApiError::refused("no")), None);
        assert_eq!(line, b"{\"error\":{\"class\":\"refused\",\"desc\":\"no\"}}\n");
    }
}
