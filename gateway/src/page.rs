//! The chat page that `headgate dev` serves: a few files that are part of the binary and load nothing from elsewhere.

use http::{HeaderValue, Method, header};
use hyper::{Request, Response};

use crate::body::Reply;

struct Asset {
    path: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
}

macro_rules! assets {
    ($($path:literal $kind:literal $file:literal;)*) => {
        const ASSETS: &[Asset] = &[$(Asset { path: $path, kind: $kind, bytes: include_bytes!(concat!("../page/", $file)) },)*];
    };
}

assets! {
    "/" "text/html; charset=utf-8" "index.html";
    "/style.css" "text/css; charset=utf-8" "style.css";
    "/app.js" "text/javascript; charset=utf-8" "app.js";
    "/answer.js" "text/javascript; charset=utf-8" "answer.js";
    "/dom.js" "text/javascript; charset=utf-8" "dom.js";
    "/gaps.js" "text/javascript; charset=utf-8" "gaps.js";
    "/sse.js" "text/javascript; charset=utf-8" "sse.js";
    "/transport.js" "text/javascript; charset=utf-8" "transport.js";
    "/turn.js" "text/javascript; charset=utf-8" "turn.js";
    "/verdict.js" "text/javascript; charset=utf-8" "verdict.js";
    "/favicon.svg" "image/svg+xml" "favicon.svg";
    "/favicon.ico" "image/svg+xml" "favicon.svg";
}

/// What the page may do: talk to its own origin, WebSockets included (CSP Level 3 section 6.7.2.8), and turn no text into markup.
/// A model's answer that got past everything else would still run nothing and reach nobody.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// The file that a GET or HEAD request names; `None` for any other request.
pub fn answer<B>(request: &Request<B>) -> Option<Response<Reply>> {
    let asset = ASSETS.iter().find(|asset| asset.path == request.uri().path())?;
    let reply = match *request.method() {
        Method::GET => Reply::from(asset.bytes),
        Method::HEAD => Reply::empty(),
        _ => return None,
    };
    let mut response = Response::new(reply);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(asset.bytes.len()));
    for (name, value) in [
        (header::CONTENT_TYPE, asset.kind),
        // The page belongs to the gateway that serves it: another version must never be mixed in.
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    Some(response)
}

/// The public keys that verdicts are checked by, for the page: it may ask nobody but its own origin. `None` for any other request.
pub fn keys<B>(request: &Request<B>, jwks: String) -> Option<Response<Reply>> {
    if request.uri().path() != "/.well-known/jwks.json" || request.method() != Method::GET {
        return None;
    }
    let mut response = Response::new(Reply::from(jwks));
    // RFC 7517 section 8.5.1.
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/jwk-set+json"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Some(response)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use http_body_util::BodyExt;

    use super::*;

    fn ask(method: Method, path: &str) -> Option<Response<Reply>> {
        answer(&Request::builder().method(method).uri(path).body(()).unwrap())
    }

    async fn body(response: Response<Reply>) -> Vec<u8> {
        let Ok(body) = response.into_body().collect().await else { panic!("a whole body cannot fail") };
        body.to_bytes().to_vec()
    }

    #[tokio::test]
    async fn every_file_of_the_page_is_served_as_it_is() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("page");
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = if name == "index.html" { "/".to_owned() } else { format!("/{name}") };
            let response = ask(Method::GET, &path).unwrap_or_else(|| panic!("{path} is not served"));
            assert_eq!(body(response).await, fs::read(entry.path()).unwrap(), "{path}");
        }
    }

    #[tokio::test]
    async fn a_head_request_gets_the_same_headers_and_no_body() {
        for asset in ASSETS {
            let (get, head) = (ask(Method::GET, asset.path).unwrap(), ask(Method::HEAD, asset.path).unwrap());
            assert_eq!(get.headers(), head.headers());
            assert_eq!(head.headers()[header::CONTENT_LENGTH], asset.bytes.len().to_string());
            assert!(body(head).await.is_empty());
        }
    }

    #[test]
    fn what_is_no_file_of_the_page_is_not_answered() {
        for (method, path) in [
            (Method::GET, "/app.js/"),
            (Method::GET, "/../app.js"),
            (Method::GET, "/v1/chat/stream"),
            (Method::POST, "/"),
            (Method::OPTIONS, "/"),
        ] {
            assert!(ask(method.clone(), path).is_none(), "{method} {path}");
        }
        assert!(ask(Method::GET, "/?x=1").is_some(), "a query changes nothing");
    }

    /// The page must work with nothing but itself: what it names must be among its own files.
    #[test]
    fn the_page_names_no_other_host_and_no_file_that_is_not_there() {
        let served: BTreeSet<&str> = ASSETS.iter().map(|asset| asset.path).collect();
        for asset in ASSETS {
            let text = std::str::from_utf8(asset.bytes).unwrap();
            let foreign = text
                .match_indices("://")
                .filter(|(at, _)| !text[..*at].ends_with("http") || !text[*at..].starts_with("://www.w3.org/2000/svg"));
            assert_eq!(foreign.count(), 0, "{} names another host", asset.path);
            for (lead, base) in [("from \"./", "/"), ("src=\"", ""), ("href=\"/", "/")] {
                for (at, _) in text.match_indices(lead) {
                    let rest = &text[at + lead.len()..];
                    let named = format!("{base}{}", &rest[..rest.find('"').unwrap()]);
                    assert!(served.contains(named.as_str()), "{} names {named}", asset.path);
                }
            }
        }
    }

    #[test]
    fn the_keys_are_at_their_one_place() {
        let ask = |path: &str| keys(&Request::builder().uri(path).body(()).unwrap(), "{}".to_owned());
        assert_eq!(ask("/.well-known/jwks.json").unwrap().headers()[header::CONTENT_TYPE], "application/jwk-set+json");
        assert!(ask("/jwks.json").is_none());
    }

    #[test]
    fn scripts_and_styles_come_only_from_the_gateway_itself() {
        let response = ask(Method::GET, "/").unwrap();
        let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; "));
        assert!(!policy.contains("unsafe") && !policy.contains('*') && !policy.contains("  "), "{policy}");
        assert_eq!(response.headers()[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
    }
}
