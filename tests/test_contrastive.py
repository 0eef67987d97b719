"""Models of images and text: their images' embeddings, and the classes that texts make of these."""

from __future__ import annotations

import json

import pytest
import small_models as make
import torch
from cases import case_named
from models import cut_of
from runs import recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

import skipat_surgery
from skipat_surgery.commands import digits, loading
from skipat_surgery.commands.classes import names_in, names_of
from skipat_surgery.commands.sources import load_model
from skipat_surgery.commands.texts import parse_texts, text_embedding, zero_shot
from skipat_surgery.convert.training import Progress, Training
from skipat_surgery.observing import outputs_of
from skipat_surgery.tasks.contrastive import Contrastive, ImageFeatures, ZeroShot
from skipat_surgery.tasks.finding import give_task, task_of
from skipat_surgery.tower import Tower

TEXTS = [f"the digit {number}" for number in range(10)]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[EOS]", "the", "digit", *map(str, range(10))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with its image processor and its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = make.two_towers("CLIPModel", "CLIPConfig", "CLIPVisionConfig", "CLIPTextConfig")()
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(size=side, crop_size=side).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "MetaClip2Model", "Aimv2Model"])
def test_the_embedding_is_what_the_whole_model_gives(name):
    case = case_named(name)
    model, images = case.model().float(), case.images().float()
    with torch.no_grad():
        expected = case.call(model, images).image_embeds  # of unit length
    found = outputs_of(model, Tower.of(model), images).head["embedding"]
    torch.testing.assert_close(F.normalize(found, dim=-1), F.normalize(expected, dim=-1).float())


def test_text_embeddings_are_the_models_own(clip):
    host = loading.load(str(clip))
    found = text_embedding(host.model, tokenizer(), TEXTS)
    for text, row in zip(TEXTS, found, strict=True):
        tokens = tokenizer()(text, return_tensors="pt")
        longest = {key: F.pad(tokens[key], (0, 16 - tokens[key].shape[1])) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = host.model(pixel_values=torch.zeros(1, 3, 32, 32), **longest).text_embeds[0]
        torch.testing.assert_close(F.normalize(row, dim=0), expected)


def test_zero_shot_classes_are_those_of_the_whole_model(clip):
    host = loading.load(str(clip))
    task, images = zero_shot(host, str(clip), TEXTS), torch.randn(6, 3, 32, 32)
    tokens = tokenizer()(TEXTS, return_tensors="pt", padding="max_length", max_length=16)
    with torch.no_grad():
        shown = host.model(pixel_values=images, **{key: tokens[key] for key in ("input_ids", "attention_mask")})
    head = outputs_of(host.model, Tower.of(host.model), images, task=task).head
    torch.testing.assert_close(task.logits(head) * host.model.logit_scale.exp().detach(), shown.logits_per_image)
    wanted = shown.logits_per_image.argmax(dim=1)
    figures, labelled = task.against_labels(head, wanted)
    assert figures["top1"].tolist() == [1.0] * 6
    assert bool(labelled.all())
    other = cut_of(host.model).float()
    mine = outputs_of(other, Tower.of(other), images, task=task).head
    same = task.logits(mine).argmax(dim=1) == wanted
    assert torch.equal(task.figures(mine, head)["agreement"], same.float())


def test_what_the_steps_run_is_a_module_that_can_be_wrapped(clip):
    """Calling anything else than what DDP wraps would leave its gradients out of step."""
    from accelerate import Accelerator

    model = loading.load(str(clip)).model
    student = cut_of(model).float()
    config = recipe_config()
    training = Training(student, model, Accelerator(cpu=True), config, Progress())
    assert isinstance(training.student, ImageFeatures)
    wrapped = torch.nn.DataParallel(training.student)
    assert Contrastive().called(wrapped) is wrapped


def recipe_config():
    from skipat_surgery.convert.settings import TrainingConfig

    return TrainingConfig(max_steps=1, warmup_steps=0)


def test_a_whole_clip_is_distilled_on_images_alone(clip, tmp_path, monkeypatch):
    """And by its texts put into classes, of which labels tell."""
    monkeypatch.setattr("skipat_surgery.commands.distill.difference_after_reload", lambda *given: 0.0)
    run = recipe(clip, tmp_path / "run", texts=",".join(TEXTS), max_steps=2, eval_steps=2)
    run.run()
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    data = digits.load_digits()["test"]
    task, top1, heads = zero_shot(loading.load(str(clip)), str(clip), TEXTS), {}, {}
    for row, folder in (("teacher", clip), ("distilled", tmp_path / "run" / "last")):
        host = loading.load(str(folder))
        pixels = host.preprocess([image.convert("RGB") for image in data["image"]])
        with torch.no_grad():
            heads[row] = task.read(host.model.get_image_features(pixels))
        top1[row] = task.logits(heads[row]).argmax(dim=1)
        expected = (top1[row] == torch.tensor(data["label"])).float().mean()
        assert rows[row]["top1"] == pytest.approx(float(expected), abs=1e-6)
    cosine = F.cosine_similarity(heads["teacher"]["embedding"], heads["distilled"]["embedding"]).mean()
    assert rows["distilled"]["embedding_cosine"] == pytest.approx(float(cosine), abs=1e-6)
    same = (top1["teacher"] == top1["distilled"]).float().mean()
    assert rows["distilled"]["agreement"] == pytest.approx(float(same), abs=1e-6)


def test_the_texts_name_the_classes(clip):
    assert names_in(TEXTS) == [str(number) for number in range(10)]
    assert names_in(["a photo of a cat", "a photo of a dog at home"]) == ["cat", "dog at home"]
    assert names_in(["cat", "cat food"]) == ["cat", "food"]
    host = loading.load(str(clip))
    give_task(host.model, zero_shot(host, str(clip), TEXTS))
    assert names_of(host.model) == names_in(TEXTS)


def test_a_given_task_is_that_of_copies(clip):
    model = loading.load(str(clip)).model
    task = ZeroShot(["a", "b"], torch.eye(2))
    give_task(model, task)
    student = skipat_surgery.apply(model, [2])
    assert task_of(torch.nn.DataParallel(student)) == task
    assert task != ZeroShot(["a", "b"], torch.ones(2, 2))
    assert task != Contrastive()


@pytest.mark.parametrize("given", ["one text", "a,,b", "a,a"])
def test_texts_that_are_none(given):
    with pytest.raises(ValueError, match="--texts takes a text for each class"):
        parse_texts(given)


def test_texts_need_a_model_that_takes_them_and_a_tokenizer(tmp_path):
    model = make.hf("ViTForImageClassification", "ViTConfig")()
    side = {"height": 32, "width": 32}
    host = loading.from_transformers(model, CLIPImageProcessor(size=side, crop_size=side))
    with pytest.raises(ValueError, match="--texts needs a model of images and texts, such as CLIPModel, got ViTFor"):
        zero_shot(host, "nowhere", TEXTS)
    model = make.two_towers("CLIPModel", "CLIPConfig", "CLIPVisionConfig", "CLIPTextConfig")()
    host = loading.from_transformers(model, host.processor)
    host.save(model, tmp_path)
    with pytest.raises(ValueError, match="--texts needs the tokenizer of"):
        load_model(str(tmp_path), None, tmp_path, texts="a,b")
