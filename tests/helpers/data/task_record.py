"""A sample with the fields of each kind of data. A task reads those that it knows; a new task adds its own here."""

RECORD = {
    "questions": [{"question": f"is it {i}?", "answers": ["yes"]} for i in range(3)],
    "captions": ["a red circle", "a circle"],
    "label": 2,
    "class_name": "red",
    "conversations": [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a circle"}],
}
