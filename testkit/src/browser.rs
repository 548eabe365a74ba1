//! A real browser, driven over its remote debugging port: what a page does with our streams is tried, not believed.

use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::services::{Missing, Program, Ready, Service};
use crate::soon;

/// How large a screenshot may be, in bytes of base64.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// A headless Chromium with one page.
pub struct Browser {
    service: Service,
    socket: WebSocketStream<TcpStream>,
    /// Which page the commands are for.
    session: Option<String>,
    sent: u64,
}

impl Browser {
    /// Starts a browser and opens `url`.
    pub async fn open(url: &str) -> Result<Browser, Missing> {
        let program = Program::find(&["chromium", "chromium-browser", "google-chrome"], "HEADGATE_CHROMIUM", "apt-get install chromium")?;
        let profile = format!("--user-data-dir={}", program.folder().join("profile").display());
        let program = program
            // Root in a container has no sandbox to offer; the only pages opened are the test's own.
            .arguments(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .arguments(["--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"])
            .argument(profile)
            .argument("about:blank");
        let service = program.start(Ready::Line("DevTools listening on ".into())).await;
        let line = service.line("DevTools listening on ").await;
        let debugger = line.split("listening on ").nth(1).expect("the line was found by these words").trim().to_owned();
        let addr: SocketAddr =
            debugger.trim_start_matches("ws://").split('/').next().and_then(|addr| addr.parse().ok()).expect("an address on this machine");
        let stream = soon(TcpStream::connect(addr), "the browser").await.expect("the browser listens");
        let limits = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE_BYTES)).max_frame_size(Some(MAX_MESSAGE_BYTES));
        let opening = tokio_tungstenite::client_async_with_config(debugger, stream, Some(limits));
        let (socket, _) = soon(opening, "the browser").await.expect("the browser speaks WebSocket");
        let mut browser = Browser { service, socket, session: None, sent: 0 };
        let page = browser.command("Target.createTarget", json!({"url": "about:blank"})).await;
        let attached = browser.command("Target.attachToTarget", json!({"targetId": page["targetId"], "flatten": true})).await;
        browser.session = Some(attached["sessionId"].as_str().expect("a session's id").to_owned());
        browser.navigate(url).await;
        Ok(browser)
    }

    /// Goes to another page and waits until it is loaded.
    pub async fn navigate(&mut self, url: &str) {
        let gone = self.command("Page.navigate", json!({"url": url})).await;
        assert!(gone.get("errorText").is_none(), "the browser cannot open {url}: {gone}");
        let loaded = "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', () => done()))";
        self.evaluate(loaded).await;
    }

    /// The value of a JavaScript expression on the page; a promise is waited for. Panics where it throws.
    pub async fn evaluate(&mut self, expression: &str) -> Value {
        let wanted = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let answer = self.command("Runtime.evaluate", wanted).await;
        assert!(answer.get("exceptionDetails").is_none(), "`{expression}` threw: {}", answer["exceptionDetails"]);
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true on the page, looking after every change of the document and every 50 ms.
    pub async fn until(&mut self, expression: &str) {
        let script = format!(
            "new Promise(done => {{ const look = () => {{ if ({expression}) {{ clearInterval(timer); watch.disconnect(); done() }} }}; \
             const watch = new MutationObserver(look); const timer = setInterval(look, 50); \
             watch.observe(document, {{subtree: true, childList: true, characterData: true, attributes: true}}); look() }})"
        );
        self.evaluate(&script).await;
    }

    /// The document as it stands.
    pub async fn html(&mut self) -> String {
        self.evaluate("document.documentElement.outerHTML").await.as_str().unwrap_or_default().to_owned()
    }

    /// A picture of the page, as PNG. `width` and `height` in pixels.
    pub async fn screenshot(&mut self, width: u32, height: u32) -> Vec<u8> {
        use base64::Engine;
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.command("Emulation.setDeviceMetricsOverride", size).await;
        let picture = self.command("Page.captureScreenshot", json!({"format": "png"})).await;
        base64::engine::general_purpose::STANDARD.decode(picture["data"].as_str().unwrap_or_default()).expect("a picture in base64")
    }

    /// What the browser printed: for canaries and for faults.
    pub fn output(&self) -> String {
        self.service.output()
    }

    /// One command of the DevTools protocol: its result.
    pub async fn command(&mut self, method: &str, parameters: Value) -> Value {
        self.sent += 1;
        let mut message = json!({"id": self.sent, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let asked = async {
            self.socket.send(Message::text(message.to_string())).await.expect("the browser is running");
            loop {
                let message = self.socket.next().await.expect("the browser is running").expect("the browser speaks WebSocket");
                let Message::Text(text) = message else { continue };
                let answer: Value = serde_json::from_str(text.as_str()).expect("the browser speaks JSON");
                if answer["id"] == self.sent {
                    assert!(answer.get("error").is_none(), "{method}: {}", answer["error"]);
                    return answer["result"].clone();
                }
            }
        };
        soon(asked, &format!("the browser to answer {method}")).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::{Answer, Cut};
    use crate::services::OrSkip;
    use crate::upstream::{Script, Upstream};

    #[tokio::test]
    async fn a_page_reads_a_stream_and_is_read_and_pictured() {
        let page = "<!doctype html><body><p id=said></p><script>(async () => { \
            const body = (await fetch('/stream')).body.pipeThrough(new TextDecoderStream()).getReader(); let text = ''; \
            for (;;) { const {value, done} = await body.read(); if (done) break; text += value } \
            document.getElementById('said').textContent = text.match(/\"text\":\"[^\"]*/g).map(t => t.slice(8)).join(''); })()</script>";
        let server = Upstream::answering(move |request| match request.target.as_str() {
            "/" => Script::reply(200, "text/html; charset=utf-8", page),
            "/stream" => Script::stream(Answer::conversation("demo", &["grün ", "und gut"]).cut(Cut::Inside)),
            _ => Script::reply(404, "text/plain", ""),
        })
        .await;
        let Some(mut browser) = Browser::open(&server.url()).await.or_skip("a_page_reads_a_stream_and_is_read_and_pictured") else {
            return;
        };
        browser.until("document.getElementById('said').textContent.endsWith('gut')").await;
        assert!(browser.html().await.contains("grün und gut"));
        assert!(browser.screenshot(800, 600).await.starts_with(b"\x89PNG"));
    }
}
