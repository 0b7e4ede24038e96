"""One display for several targets."""

from __future__ import annotations

import io
import json

from offload_client.bake.targetdisplay import TargetDisplay
from offload_client.progress.display import make_display
from offload_proto.v1.events_pb2 import ProgressBatch

DIGEST = "sha256:" + "a" * 64


def batch(*, done: bool) -> ProgressBatch:
    found = ProgressBatch()
    vertex = found.vertices.add(digest=DIGEST, name="[1/2] FROM base", inputs=[DIGEST])
    vertex.started_at.FromSeconds(1000)
    if done:
        vertex.completed_at.FromSeconds(1001)
    log = found.logs.add(vertex=DIGEST, stream=1, data=b"text\n")
    log.timestamp.FromSeconds(1000)
    return found


def test_same_step_of_two_targets_is_two_steps():
    stream = io.StringIO()
    with make_display("plain", stream, {}) as joint:
        app, web = TargetDisplay(joint, "app"), TargetDisplay(joint, "web")
        app.feed(batch(done=False))
        web.feed(batch(done=True))
        app.feed(batch(done=True))
        with app.local_step("[offload] build context") as step:
            step.rename("[offload] build context: 1MB sent")
        web.notice("warning", "careful")
    text = stream.getvalue()
    assert "[app 1/2] FROM base" in text
    assert "[web 1/2] FROM base" in text
    assert text.count("DONE 1.0s") == 2
    assert "[app offload] build context" in text
    assert "\n#3 [offload]" not in text
    assert "web: careful" in text


def test_messages_of_the_build_stay_as_they_are():
    stream = io.StringIO()
    mine = batch(done=True)
    with make_display("rawjson", stream, {}) as joint:
        TargetDisplay(joint, "app").feed(mine)
    assert mine == batch(done=True)
    shown = [json.loads(line) for line in stream.getvalue().splitlines()]
    (vertex,) = [vertex for status in shown for vertex in status.get("vertexes", [])]
    assert vertex["name"] == "[app 1/2] FROM base"
    assert vertex["digest"] == vertex["inputs"][0] != DIGEST
    assert len(vertex["digest"]) == len(DIGEST)


def test_name_without_brackets_gets_some():
    with make_display("quiet", io.StringIO(), {}) as joint:
        assert TargetDisplay(joint, "app").named("exporting to image") == "[app] exporting to image"
