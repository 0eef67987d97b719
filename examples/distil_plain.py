"""Distil in twenty lines of plain PyTorch, without the recipe. Real digits; the teacher is trained on the spot."""

import copy

import torch
from torch.nn import functional as F

import skipat_surgery
from skipat_surgery.commands import digits

host = digits.train_teacher(steps=120)
teacher, data = host.model, digits.load_digits()
train, test = (host.preprocess([image.convert("RGB") for image in data[split]["image"]]) for split in ("train", "test"))

student = skipat_surgery.apply(copy.deepcopy(teacher), skip=range(3, 9))
skipat_surgery.solve(student, teacher, train.split(256))
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
for _ in range(60):
    images = train[torch.randint(len(train), (64,))]
    with torch.no_grad():
        expected = teacher(images).logits.log_softmax(dim=-1)
    found = student(images).logits.log_softmax(dim=-1)
    loss = F.kl_div(found, expected, log_target=True, reduction="batchmean")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

with torch.no_grad():
    same = student.eval()(test).logits.argmax(dim=-1) == teacher(test).logits.argmax(dim=-1)
print(f"agreement with the teacher on {len(test)} test images: {same.float().mean():.1%}")
