"""Downloads from a server in this process: files are checked, and written completely or not at all."""

import hashlib
import http.server
import io
import json
import os
import threading
from contextlib import suppress

import pytest
import safetensors.torch
import torch

from headoff.detr import BackboneConfig, Detr, DetrConfig
from headoff.detr.checkpoints import cache_folder, download, huggingface, load, published, save_native
from headoff.detr.checkpoints.download import NotOnServer
from headoff.detr.checkpoints.download import download as fetch
from headoff.errors import CheckpointError, DownloadError

CONTENT = bytes(range(256)) * 5000  # more than one piece


class Server:
    """Files by path, a log of requests, and ways to misbehave."""

    def __init__(self):
        self.files, self.requests, self.missing_bytes, self.status = {}, [], 0, None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                content = outer.files.get(self.path)
                if outer.status or content is None:
                    self.send_error(outer.status or 404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with suppress(ConnectionError):  # an interrupted download closes it
                    self.wfile.write(content[: len(content) - outer.missing_bytes])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no cache of Hugging Face's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HEADOFF_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def message_of(call, *arguments, **keywords):
    with pytest.raises(DownloadError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tiny():
    torch.manual_seed(0)
    backbone = BackboneConfig("bottleneck", depths=(1, 1), widths=(2, 4), stem=4)
    return Detr(
        DetrConfig(
            backbone, width=16, encoder_layers=1, decoder_layers=1, feedforward=8, queries=3, classes=2
        )
    )


# --- one file -----------------------------------------------------------------------------------------------


def test_a_download_is_whole_and_happens_once(server, tmp_path):
    server.files["/a.bin"] = CONTENT
    target = tmp_path / "new" / "a.bin"
    for _ in range(2):
        assert fetch(f"{server.url}/a.bin", target, sha256_prefix=sha256(CONTENT)[:8]) == target
        assert target.read_bytes() == CONTENT
    assert server.requests == ["/a.bin"] and os.listdir(target.parent) == ["a.bin"]


def test_a_progress_bar_on_terminals_only(server, tmp_path, monkeypatch):
    server.files["/a.bin"] = CONTENT

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        fetch(f"{server.url}/a.bin", tmp_path / str(shown))
        assert ("100%" in stream.getvalue()) == shown


def test_a_wrong_hash_is_removed(server, tmp_path):
    server.files["/a.bin"] = CONTENT
    message = message_of(fetch, f"{server.url}/a.bin", tmp_path / "a.bin", sha256_prefix="00000000")
    assert "SHA-256" in message and sha256(CONTENT) in message and "removed" in message
    assert not os.listdir(tmp_path)


def test_a_damaged_copy_in_the_cache_is_replaced(server, tmp_path):
    server.files["/a.bin"] = CONTENT
    (tmp_path / "a.bin").write_bytes(b"damaged")
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", sha256_prefix=sha256(CONTENT)[:8])
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_transfer_that_stops_short_is_removed(server, tmp_path):
    server.files["/a.bin"] = CONTENT
    server.missing_bytes = 1000
    message = message_of(fetch, f"{server.url}/a.bin", tmp_path / "a.bin")
    assert "removed" in message and "try again" in message
    assert not os.listdir(tmp_path)


def test_a_file_that_is_not_on_the_server(server, tmp_path):
    with pytest.raises(NotOnServer, match="404"):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin")
    server.status = 503
    message = message_of(fetch, f"{server.url}/a.bin", tmp_path / "a.bin")
    assert "503" in message and str(tmp_path / "a.bin") in message
    assert not os.listdir(tmp_path)


def test_offline(server, tmp_path):
    """The message says where to put the file by hand."""
    url = f"{server.url}/a.bin"
    server.http.server_close()  # nobody listens at this port now
    message = message_of(fetch, url, tmp_path / "a.bin")
    assert "cannot be reached" in message and url in message and repr(str(tmp_path / "a.bin")) in message
    assert not os.listdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(CONTENT)
    fetch(url, tmp_path / "a.bin", sha256_prefix=sha256(CONTENT)[:8])


@pytest.mark.parametrize("url", ["nonsense", "http://[", "ftp2://x/y"])
def test_addresses_that_are_invalid(url, tmp_path):
    assert "cannot be reached" in message_of(fetch, url, tmp_path / "a.bin")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interruption_leaves_nothing(error, server, tmp_path, monkeypatch):
    """Ctrl-C after the first piece; what was there before stays."""
    server.files["/a.bin"] = CONTENT
    seen = []

    class Bar(download.tqdm):
        def update(self, n=1):
            seen.append(os.listdir(tmp_path))
            raise error

    monkeypatch.setattr(download, "tqdm", Bar)
    with pytest.raises(error):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert len(seen[0]) == 1 and seen[0][0].endswith(".part")
    assert not os.listdir(tmp_path)


def test_a_connection_that_breaks_off(server, tmp_path, monkeypatch):
    server.files["/a.bin"] = CONTENT

    def broken(*_):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("http.client.HTTPResponse.read", broken)
    assert "broke off" in message_of(fetch, f"{server.url}/a.bin", tmp_path / "a.bin")
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    server.files["/a.bin"] = CONTENT
    (tmp_path / "file").write_text("")
    message = message_of(fetch, f"{server.url}/a.bin", tmp_path / "file" / "a.bin")
    assert "HEADOFF_CACHE" in message


# --- published checkpoints ----------------------------------------------------------------------------------


def test_where_downloads_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADOFF_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("HEADOFF_CACHE")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert cache_folder() == tmp_path / "hub" / "checkpoints"


def test_published_names_hold_their_hashes():
    assert set(published.ORIGINALS) == {
        f"detr-resnet-{depth}{dilated}" for depth in (50, 101) for dilated in ("", "-dc5")
    }
    assert published.ORIGINALS["detr-resnet-50"] == "detr-r50-e632da11.pth"
    assert all(published.hash_prefix(name) for name in published.ORIGINALS.values())
    assert published.hash_prefix("detr-r50-dc5-f0fb7ef5.pth") == "f0fb7ef5"


@pytest.fixture
def original(server, cache, monkeypatch):
    """`detr-resnet-50-dc5`, as a small pickle of the same form; its name in the cache."""
    buffer = io.BytesIO()
    torch.save(
        {"model": hugging_face_names(tiny().state_dict())}, buffer, _use_new_zipfile_serialization=False
    )
    name = f"detr-r50-dc5-{sha256(buffer.getvalue())[:8]}.pth"
    server.files[f"/{name}"] = buffer.getvalue()
    monkeypatch.setitem(published.ORIGINALS, "detr-resnet-50-dc5", name)
    monkeypatch.setattr(published, "ORIGINALS_URL", server.url)
    return name


def test_loading_by_published_name(original, server, cache):
    first = load("detr-resnet-50-dc5")
    assert first.config.backbone.dilate_last and first.config.queries == 3
    second = load("detr-resnet-50-dc5", dilated=False)
    assert not second.config.backbone.dilate_last
    assert server.requests == [f"/{original}"] and os.listdir(cache) == [original]


def test_a_published_file_that_was_tampered_with(original, server, cache):
    server.files[f"/{original}"] += b"\0"
    assert "SHA-256" in message_of(load, "detr-resnet-50-dc5")
    assert not os.listdir(cache)


# --- the Hugging Face hub -----------------------------------------------------------------------------------


@pytest.fixture
def repository(server, cache, monkeypatch):
    """`someone/detr` on the hub, in safetensors; the folder of its URLs."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    folder = "/someone/detr/resolve/main"
    tensors = hugging_face_names(tiny().state_dict())
    config = {"model_type": "detr", "encoder_attention_heads": 2, "id2label": {"0": "cat", "1": "dog"}}
    server.files[f"{folder}/config.json"] = json.dumps(config).encode()
    server.files[f"{folder}/model.safetensors"] = safetensors.torch.save(tensors)
    return folder


def hugging_face_names(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in (
            ("backbone.", "model.backbone.conv_encoder.model."),
            ("encoder.", "model.encoder."),
            ("decoder.", "model.decoder."),
            ("input_projection.", "model.input_projection."),
            ("query_embedding.", "model.query_position_embeddings."),
            ("class_head.", "class_labels_classifier."),
        ):
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        for ours, theirs in (
            ("box_head.0", "bbox_predictor.layers.0"),
            ("box_head.2", "bbox_predictor.layers.1"),
            ("box_head.4", "bbox_predictor.layers.2"),
            ("self_attention.", "self_attn."),
            ("cross_attention.", "encoder_attn."),
            ("attn.query", "attn.q_proj"),
            ("attn.key", "attn.k_proj"),
            ("attn.value", "attn.v_proj"),
            ("attn.output", "attn.out_proj"),
            ("feedforward.expand", "fc1"),
            ("feedforward.contract", "fc2"),
            ("self_residual.norm", "self_attn_layer_norm"),
            ("cross_residual.norm", "encoder_attn_layer_norm"),
            ("feedforward_residual.norm", "final_layer_norm"),
            ("decoder.norm", "decoder.layernorm"),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def test_loading_from_the_hub(repository, server, cache):
    for _ in range(2):
        detector = load("someone/detr")
        assert detector.config.heads == 2 and detector.class_names == ("cat", "dog")
    # the preprocessor's configuration is optional, and asked for once
    assert [path.rpartition("/")[2] for path in server.requests] == [
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    ]
    assert sorted(os.listdir(cache / "someone--detr")) == ["config.json", "model.safetensors"]


def test_the_preprocessing_of_a_repository(repository, server, cache):
    values = {"size": {"shortest_edge": 96, "longest_edge": 128}}
    server.files[f"{repository}/preprocessor_config.json"] = json.dumps(values).encode()
    assert load("someone/detr").preprocessing.short_side == 96


def test_a_repository_with_pickled_weights_only(repository, server, cache):
    tensors = safetensors.torch.load(server.files.pop(f"{repository}/model.safetensors"))
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    server.files[f"{repository}/pytorch_model.bin"] = buffer.getvalue()
    assert load("someone/detr").config.queries == 3


@pytest.fixture
def sharded(repository, server):
    """The same repository with its weights in three files; the names of these."""
    tensors = safetensors.torch.load(server.files.pop(f"{repository}/model.safetensors"))
    shards = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    places = {tensor: shards[number % 3] for number, tensor in enumerate(tensors)}
    for shard in shards:
        part = {tensor: tensors[tensor] for tensor, place in places.items() if place == shard}
        server.files[f"{repository}/{shard}"] = safetensors.torch.save(part)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    server.files[f"{repository}/model.safetensors.index.json"] = index.encode()
    return shards


def requested(server):
    names = [path.rpartition("/")[2] for path in server.requests]
    server.requests.clear()
    return names


def test_a_repository_with_weights_in_several_files(sharded, repository, server, cache):
    index = "model.safetensors.index.json"
    for _ in range(2):
        state = load("someone/detr").state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in tiny().state_dict().items())
    assert requested(server) == [
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        index,
        *sharded,
    ]
    assert sorted(os.listdir(cache / "someone--detr")) == sorted(["config.json", index, *sharded])


def test_an_interrupted_download_of_several_files_goes_on(sharded, repository, server, cache):
    """Complete files are kept, and the index, which says that all are there, comes last."""
    last = server.files.pop(f"{repository}/{sharded[2]}")
    assert sharded[2] in message_of(load, "someone/detr")
    folder = cache / "someone--detr"
    assert not (folder / "model.safetensors.index.json").exists()
    server.files[f"{repository}/{sharded[2]}"] = last[:-8]
    assert "removed" in message_of(load, "someone/detr")
    server.files[f"{repository}/{sharded[2]}"] = last
    requested(server)
    load("someone/detr")
    assert [name for name in requested(server) if name in sharded] == sharded[2:]
    assert not list(folder.glob("unfinished*"))


@pytest.mark.parametrize("places", [{}, {"a": "../../evil.safetensors"}, {"a": 1}, {"a": ""}])
def test_an_index_that_is_no_index(places, sharded, repository, server, cache):
    server.files[f"{repository}/model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    assert "removed" in message_of(load, "someone/detr")
    assert not list(cache.rglob("*index.json")) and not list(cache.rglob("*.safetensors"))


def test_hugging_faces_own_cache_without_a_shard_is_not_used(sharded, server, tmp_path, cache, repository):
    folder = tmp_path / "hub" / "models--someone--detr"
    snapshot = folder / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors.index.json", *sharded[:2]):
        (snapshot / name).write_bytes(server.files[f"{repository}/{name}"])
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    assert load("someone/detr").class_names == ("cat", "dog")
    assert sharded[2] in requested(server)
    (snapshot / sharded[2]).write_bytes(server.files[f"{repository}/{sharded[2]}"])
    load("someone/detr")
    assert not requested(server)


def test_a_repository_that_is_not_there(server, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert "404" in message_of(load, "someone/else")
    assert not cache.exists() or not list(cache.rglob("*.json"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_login_page_does_not_stay_in_the_cache(name, repository, server, cache):
    good = server.files[f"{repository}/{name}"]
    server.files[f"{repository}/{name}"] = b"<html>please sign in</html>"
    assert "removed" in message_of(load, "someone/detr")
    assert not (cache / "someone--detr" / name).exists()
    server.files[f"{repository}/{name}"] = good
    load("someone/detr")


def test_hugging_faces_own_cache_is_used(server, tmp_path, cache, repository):
    folder = tmp_path / "hub" / "models--someone--detr"
    snapshot = folder / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes(server.files[f"{repository}/{name}"])
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    assert load("someone/detr").class_names == ("cat", "dog")
    assert not server.requests


def test_a_local_folder_comes_before_the_hub(server, cache, tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "detr").mkdir(parents=True)
    save_native(tiny(), tmp_path / "someone" / "detr" / "model.safetensors")
    assert load("someone/detr").class_names == ("class 0", "class 1")
    assert not server.requests


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("facebook/detr-resnet-50", True),
        ("a/b", True),
        ("a", False),
        ("a/b/c", False),
        ("../b", False),
        ("a/..", False),
        ("/a/b", False),
        ("a b/c", False),
    ],
)
def test_names_of_repositories(name, is_one):
    assert huggingface.is_repository(name) == is_one


def test_a_download_error_is_a_checkpoint_error():
    assert issubclass(DownloadError, CheckpointError)
