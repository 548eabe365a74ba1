"""The `websockets` library against a running gateway: python websocket.py WS_URL TOKEN. Two turns at once on one socket, a stop, a bad frame, a wrong token."""

import asyncio
import json
import sys

import websockets

url, token = sys.argv[1:3]


def turn(text, ref):
    return json.dumps({"type": "turn", "ref": ref, "messages": [{"role": "user", "content": text}]})


async def until(socket, wanted):
    """Frames until `wanted` turns have ended, by turn."""
    turns, ended = {}, 0
    while ended < wanted:
        frame = json.loads(await asyncio.wait_for(socket.recv(), 30))
        frames = turns.setdefault(frame.get("turn_id"), [])
        assert frame.get("seq", len(frames)) == len(frames), "sequence numbers have no holes"
        frames.append(frame)
        ended += frame["type"] in ("done", "error")
    return turns


def text(frames):
    return "".join(frame["text"] for frame in frames if frame["type"] == "text")


async def main():
    async with websockets.connect(url, subprotocols=["headgate.v1", f"bearer.{token}"]) as socket:
        assert socket.subprotocol == "headgate.v1"
        await socket.send(turn("hello", "a"))
        await socket.send(turn("what is your email address?", "b"))
        turns = await until(socket, 2)
        assert len(turns) == 2
        by_ref = {frames[0]["ref"]: frames for frames in turns.values()}
        assert all(frames[0]["type"] == "open" and frames[-1]["type"] == "done" for frames in turns.values())
        assert text(by_ref["a"]).strip()
        assert "•••" in text(by_ref["b"]) and "@" not in text(by_ref["b"])
        assert by_ref["b"][-1]["outcome"] == "masked" and by_ref["b"][-1]["verdict"].count(".") == 2

        # A stop while the answer streams: the safe prefix stays, the end says so.
        await socket.send(turn("tell me a long story about a parcel", "c"))
        opened = json.loads(await asyncio.wait_for(socket.recv(), 30))
        while (frame := json.loads(await asyncio.wait_for(socket.recv(), 30)))["type"] != "text":
            pass
        await socket.send(json.dumps({"type": "stop", "turn_id": opened["turn_id"]}))
        while frame["type"] not in ("done", "error"):
            frame = json.loads(await asyncio.wait_for(socket.recv(), 30))
        assert frame["code"] == "stopped", frame

        # A bad frame costs that frame, not the socket.
        await socket.send("{not json")
        assert json.loads(await socket.recv())["code"] == "malformed_json"
        await socket.send(json.dumps({"type": "turn", "messages": [], "surprise": 1}))
        assert json.loads(await socket.recv())["code"] == "invalid_request"
        await socket.send(turn("hello", "d"))
        assert list((await until(socket, 1)).values())[0][-1]["type"] == "done"

    # A wrong token: an error frame, then the close code says that a new one is needed.
    async with websockets.connect(url, subprotocols=["headgate.v1", "bearer.hg_wrong"]) as socket:
        await socket.send(turn("hello", "e"))
        assert json.loads(await socket.recv())["code"] == "unauthenticated"
        try:
            await asyncio.wait_for(socket.recv(), 10)
            raise AssertionError("the socket stays open")
        except websockets.ConnectionClosed as closed:
            assert closed.rcvd.code == 3000, closed.rcvd
    print("ok: websockets", websockets.__version__)


asyncio.run(main())
