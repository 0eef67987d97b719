"""Distil in a loop of plain PyTorch, with the losses and optimizers of the recipe, on real digits."""

import copy

import torch

import skipat_surgery
from skipat_surgery import LossWeights, Tower, outputs_of
from skipat_surgery.commands import digits

host = digits.train_teacher(steps=300)
teacher, data = host.model, digits.load_digits()
train, test = (host.preprocess([image.convert("RGB") for image in data[split]["image"]]) for split in ("train", "test"))

student = skipat_surgery.apply(copy.deepcopy(teacher), skip=range(3, 9))
print(skipat_surgery.solve(student, teacher, train.split(256)))
skipat_surgery.freeze_untouched(student)
optimizers = skipat_surgery.optimizers(student)  # Muon and AdamW
towers, weights, states = (Tower.of(student), Tower.of(teacher)), LossWeights(), range(3, 11)
for _ in range(60):  # skipat_surgery.distill(student, teacher, train.split(64), steps=60) does the same in one call
    images = train[torch.randint(len(train), (64,))]
    with torch.no_grad():
        expected = outputs_of(teacher, towers[1], images, states)
    found = outputs_of(student, towers[0], images, states)
    terms = skipat_surgery.distances(found, expected, towers[0].num_special_tokens)
    skipat_surgery.distillation_loss(terms, weights).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

measured = skipat_surgery.Evaluator(teacher)(student, test.split(150))
print(f"agreement with the teacher on {len(test)} test images: {measured['agreement']:.1%}")
