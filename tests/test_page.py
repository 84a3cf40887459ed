"""Pages for browsers: the folder, and what a real browser makes of it. The latter needs Chromium, Playwright, and the npm packages
onnxruntime-web (of the page's version) and axe-core in ./node_modules; `.ci/run` installs them."""

import base64
import io
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import effvit_zoo
from effvit_zoo.commands import main
from effvit_zoo.data import open_image, validation_transform
from effvit_zoo.errors import UserError
from effvit_zoo.export import page as pages
from effvit_zoo.export.preprocessing import _fit
from effvit_zoo.export.serve import make_server

MODULES = Path(__file__).parent.parent / "node_modules"
RUNTIME = MODULES / "onnxruntime-web"
CHROMIUM = shutil.which("chromium")
FLAGS = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
SOFTWARE_GPU = (
    *("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-vulkan=swiftshader"),
    *("--use-webgpu-adapter=swiftshader", "--disable-vulkan-surface"),
)
READY = "import('./app.js').then((page) => page.ready)"

needs_runtime = pytest.mark.skipif(
    not RUNTIME.is_dir(), reason="onnxruntime-web is not in ./node_modules (npm install)"
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def model(name="effzoo_swiftformer_pico", **kwargs):
    torch.manual_seed(0)
    made = timm.create_model(name, num_classes=5, **kwargs)
    for parameter in made.parameters():
        if parameter.ndim > 1:  # heads start at zero
            torch.nn.init.trunc_normal_(parameter, std=0.1)
    made.pretrained_cfg["label_names"] = ["cat", "chien", "猫", "<b>dog</b>", "كلب"]
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A page without the runtime."""
    place = tmp_path_factory.mktemp("page") / "page"
    pages.export_page(model(), place, images=8)
    return place


def test_a_page_says_what_it_is_made_of(folder):
    content = json.loads((folder / "page.json").read_text())
    assert content["labels"][2] == "猫"
    assert content["models"][0]["parts"] == [{"file": "model.onnx", "bytes": (folder / "model.onnx").stat().st_size}]
    assert content["runtime"]["base"].startswith("https://")
    assert all(entry["integrity"].startswith("sha384-") for entry in content["runtime"]["files"].values())
    assert [sample["file"] for sample in content["samples"]] == ["sample-0.png", "sample-1.png"]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("index.html", "app.js", "preprocess.js", "runtime.js", "style.css"),
        *("model.onnx", "page.json", "export.json", "sample-0.png", "sample-1.png"),
    }
    opened = effvit_zoo.open_exported(folder / "model.onnx")
    assert opened is not None


def test_large_models_lie_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "LARGEST", 1000)
    (tmp_path / "model.onnx").write_bytes(bytes(range(250)) * 10)
    parts = pages._split(tmp_path / "model.onnx")
    assert [part["bytes"] for part in parts] == [1000, 1000, 500]
    assert b"".join((tmp_path / part["file"]).read_bytes() for part in parts) == bytes(range(250)) * 10
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "onnxruntime-web", "version": "1.0.0"}, "is onnxruntime-web 1.0.0, expected onnxruntime-web 1"),
        ({"name": "left-pad", "version": "1.0.0"}, "is left-pad 1.0.0, expected onnxruntime-web"),
        (None, "there is no ort.wasm.min.mjs in"),
    ],
)
def test_another_runtime_is_refused(tmp_path, content, message):
    if content:
        (tmp_path / "package.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        pages._runtime_files(tmp_path, json.loads((pages.ASSETS / "runtime.json").read_text()))


def test_a_changed_file_of_the_runtime_is_refused(tmp_path):
    packaged = json.loads((pages.ASSETS / "runtime.json").read_text())
    for name in packaged["files"]:
        (tmp_path / name).write_text("changed")
    with pytest.raises(UserError, match=r"ort\.wasm\.min\.mjs is not that of onnxruntime-web"):
        pages._runtime_files(tmp_path, packaged)


def test_a_page_does_not_replace_other_content(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["export", "effzoo_vit_pico", "--to", "web", "--output", str(tmp_path)]) == 2
    assert "has other content than a page" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert main(["export", "effzoo_vit_pico", "--to", "web", "onnx", "--output", str(tmp_path)]) == 2
    assert "a folder of its own" in capsys.readouterr().err
    assert main(["export", "effzoo_vit_pico", "--to", "web"]) == 2
    assert "expected --output" in capsys.readouterr().err


def test_a_page_becomes_a_space(folder, the_hub, capsys):
    assert main(["push", str(folder), "ada/cats", "--space"]) == 0
    assert capsys.readouterr().out.strip() == f"{the_hub.endpoint}/spaces/ada/cats"
    there = the_hub.repos["spaces/ada/cats"].files()
    assert there["model.onnx"] == (folder / "model.onnx").read_bytes()
    about = yaml.safe_load(there["README.md"].decode().split("---")[1])
    assert (about["sdk"], about["app_file"]) == ("static", "index.html")
    assert about["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    the_hub.repos["spaces/ada/cats"].commit("main", {**there, "old.js": b""})
    assert main(["push", str(folder), "ada/cats", "--space"]) == 0
    assert set(the_hub.repos["spaces/ada/cats"].files()) == set(there)


def test_only_pages_become_spaces(tmp_path, capsys):
    assert main(["push", str(tmp_path), "ada/cats", "--space"]) == 2
    assert "has no index.html, expected a page" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "ada/cats", "--space", "--revision", "dev"]) == 2
    assert "--revision is not for a Space" in capsys.readouterr().err


# In a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *SOFTWARE_GPU])
        yield chromium
        chromium.close()


@pytest.fixture
def serve():
    """(folder, isolated) -> address; without isolation as `python -m http.server` does it."""
    servers = []

    def start(folder, isolated=True):
        plain = partial(SimpleHTTPRequestHandler, directory=str(folder))
        server = make_server(folder) if isolated else ThreadingHTTPServer(("127.0.0.1", 0), plain)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def visit(browser, serve):
    """(folder, ...) -> an open page; its `troubles` are errors of the console and requests to other servers."""
    contexts = []

    def open_page(folder, query="", isolated=True, **options):
        address = serve(folder, isolated)
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.troubles = []
        tab.on("pageerror", lambda error: tab.troubles.append(str(error)))
        tab.on("console", lambda message: tab.troubles.append(message.text) if message.type == "error" else None)
        tab.on(
            "request",
            lambda asked: None if asked.url.startswith((address, "blob:", "data:")) else tab.troubles.append(asked.url),
        )
        tab.goto(f"{address}{query}")
        return tab

    yield open_page
    for context in contexts:
        context.close()


def with_runtime(folder, place):
    """A copy of a page that holds the runtime."""
    shutil.copytree(folder, place)
    content = json.loads((place / "page.json").read_text())
    (place / "runtime").mkdir()
    for name in content["runtime"]["files"]:
        shutil.copy(RUNTIME / "dist" / name, place / "runtime")
    content["runtime"]["base"] = "runtime/"
    (place / "page.json").write_text(json.dumps(content))
    return place


@pytest.mark.slow
@needs_browser
def test_images_are_prepared_like_pillows(folder, visit):
    tab = visit(folder, "style.css")
    script = """async ([data, width, height, steps]) => {
        const { prepare } = await import("./preprocess.js");
        const image = { data: Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0)), width, height };
        return btoa(String.fromCharCode(...prepare(image, steps)));
    }"""
    random, different, total = np.random.default_rng(0), 0, 0
    sizes = [(500, 1), (1, 500), (320, 213), (33, 517), (64, 64), (300, 20)]
    for filter in ("bicubic", "bilinear", "lanczos", "box", "hamming", "nearest"):
        for mode in ("center", "border", "squash"):
            for width, height in sizes:
                if mode == "border" and 1 in (width, height):
                    continue  # Pillow can't make an image without a row
                size = [(3, 48, 48), (3, 40, 56), (1, 48, 48)][int(random.integers(3))]
                steps = {"input_size": size, "interpolation": filter, "crop_mode": mode}
                steps |= {
                    "crop_pct": [0.875, 0.9, 1.0][int(random.integers(3))],
                    "mean": [0.485, 0.456, 0.406][: size[0]],
                }
                image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
                expected = (
                    np.asarray(_fit(image.convert("L") if size[0] == 1 else image, *size[1:], steps))
                    .flatten()
                    .astype(int)
                )
                steps["tall_first"] = pages._tall_first()
                answer = tab.evaluate(script, [base64.b64encode(image.tobytes()).decode(), width, height, steps])
                got = np.frombuffer(base64.b64decode(answer), np.uint8).astype(int)
                assert got.shape == expected.shape
                assert np.abs(got - expected).max() <= 1, (filter, mode, width, height, size)
                different += (got != expected).sum()
                total += got.size
    assert different < 1e-4 * total


def photos():
    """Name -> file content, of ordinary and odd photos that browsers decode."""
    random = np.random.default_rng(1)

    def photo(width, height):
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        return coarse.resize((width, height), Image.Resampling.BICUBIC)

    def saved(image, form, **kwargs):
        file = io.BytesIO()
        image.save(file, form, **kwargs)
        return file.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    clear = photo(90, 60).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((90, 60)))
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16))
    return {
        "portrait.jpg": saved(photo(120, 310), "JPEG", quality=95),
        "panorama.jpg": saved(photo(800, 90), "JPEG", quality=95),
        "turned.jpg": saved(photo(200, 120), "JPEG", quality=95, exif=exif),
        "deep.png": saved(deep, "PNG"),
        "clear.png": saved(clear, "PNG"),
        "line.png": saved(photo(1, 500), "PNG"),
        "palette.gif": saved(photo(70, 50).quantize(60), "GIF"),
        "photo.webp": saved(photo(150, 150), "WEBP", lossless=True),
    }


def torch_logits(net, content, steps):
    transform = validation_transform(
        {key: tuple(value) if isinstance(value, list) else value for key, value in steps.items()}
    )
    with torch.inference_mode():
        return net.eval()(transform(open_image(io.BytesIO(content), name="photo"))[None])[0].double().numpy()


ANSWER = """async ([data, id]) => {
    const { answer, state } = await import("./app.js");
    const content = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
    const { logits } = await answer(new File([content], "photo"), id ?? state.chosen);
    return Array.from(logits);
}"""


@pytest.mark.slow
@needs_browser
@needs_runtime
@pytest.mark.parametrize(
    "name",
    [
        "effzoo_swiftformer_pico",
        "effzoo_swin_nano64",
        "effzoo_efficientvit_nano64",
        "effzoo_sima_vit_pico",
        "effzoo_tosa_vit_pico",
    ],
)
def test_a_page_answers_like_torch(tmp_path, visit, name):
    net = model(name, **({"attention_ratio": 0.5} if "tosa" in name else {}))
    content = pages.export_page(net, tmp_path / "page", runtime=RUNTIME, images=8)
    tab = visit(tmp_path / "page", "?threads=2")
    assert tab.evaluate(READY), tab.inner_text("#error")
    ways = tab.evaluate("import('./app.js').then((page) => Object.keys(page.state.models))")
    assert "wasm" in ways
    for title, photo in photos().items():
        expected = torch_logits(net, photo, content["preprocessing"])
        for way in ways:
            got = np.array(tab.evaluate(ANSWER, [base64.b64encode(photo).decode(), way]))
            exact = title.endswith(
                (".webp", "line.png", ".gif")
            )  # decoders of JPEG, and what is made of alpha and 16 bits, differ
            error = np.abs(got - expected).max() / np.abs(expected - expected.mean()).max()
            assert error < (1e-3 if exact else 0.2), (title, way, error)
            if np.diff(np.sort(expected)[-2:]) > 0.1:
                assert got.argmax() == expected.argmax(), (title, way)
    assert not tab.troubles
    if "tosa" in name:
        tab.click("#samples button")
        tab.wait_for_selector("#results li")
        before = tab.evaluate("document.querySelector('canvas').toDataURL()")
        tab.select_option("#layer", "0")
        tab.wait_for_function("(before) => document.querySelector('canvas').toDataURL() !== before", arg=before)


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_what_a_person_does_with_a_page(folder, tmp_path, visit):
    place = with_runtime(folder, tmp_path / "page")
    tab = visit(place, "?selftest", viewport={"width": 390, "height": 800}, color_scheme="dark")
    assert tab.evaluate(READY), tab.inner_text("#error")
    tab.wait_for_function("document.body.dataset.selftest")
    assert tab.evaluate("document.body.dataset.selftest") == "passed"
    assert "Threads\n" in tab.inner_text("#facts")
    (tmp_path / "photo.png").write_bytes(photos()["line.png"])
    tab.set_input_files("#file", tmp_path / "photo.png")
    tab.wait_for_selector("#results li")
    shown = tab.inner_text("#results")
    assert "<b>dog</b>" in shown  # as text
    assert shown.count("%") == 5
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for name, words in (("notes.txt", "text/plain"), ("broken.jpg", "damaged")):
        (tmp_path / name).write_bytes(photos()["portrait.jpg"][:300] if name == "broken.jpg" else b"no image")
        tab.set_input_files("#file", tmp_path / name)
        tab.wait_for_selector("#error:not([hidden])")
        assert name in tab.inner_text("#error")
        assert words in tab.inner_text("#error")
    tab.click("#camera")  # headless Chromium has none
    tab.wait_for_function("document.querySelector('#error').textContent.includes('camera')")
    assert not tab.troubles
    axe = MODULES / "axe-core" / "axe.min.js"
    if axe.is_file():
        tab.add_script_tag(path=axe)
        found = tab.evaluate(
            "axe.run().then(({ violations }) => violations.map(({ id, impact }) => `${impact}: ${id}`))"
        )
        assert not [line for line in found if line.startswith(("serious", "critical"))]


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_a_page_on_a_plain_server_has_one_thread_and_says_so(folder, tmp_path, visit):
    tab = visit(with_runtime(folder, tmp_path / "page"), isolated=False)
    assert tab.evaluate(READY), tab.inner_text("#error")
    tab.click("summary")
    assert "1: this server doesn't isolate the page" in tab.inner_text("#facts")
    assert not tab.troubles


@pytest.mark.slow
@needs_browser
@needs_runtime
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.onnx", "has 1000 bytes, expected"),
        ("runtime/ort-wasm-simd-threaded.wasm", "expected"),
        ("page.json", "404"),
    ],
)
def test_a_damaged_page_says_so(folder, tmp_path, visit, file, words):
    place = with_runtime(folder, tmp_path / "page")
    if file == "page.json":
        (place / file).unlink()
    else:
        for path in place.rglob(Path(file).name.replace("threaded", "threaded*")):
            path.write_bytes(path.read_bytes()[:1000])
    tab = visit(place)
    assert not tab.evaluate(READY)
    message = tab.inner_text("#error")
    assert words in message or "integrity" in message or "Failed to fetch" in message
