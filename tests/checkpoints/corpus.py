"""The text that the checkpoints' tokenizers are trained on."""

_SENTENCES = (
    "What is in this picture? What colour is the shape in the second image?",
    "The picture shows a red circle and a blue square on a white ground.",
    "You are a helpful assistant. Describe the images one after the other.",
    "There are three shapes: a star, a triangle and a circle. Nothing else is there.",
    "Compare the first picture with the last one, and say which of them is larger.",
    "The renderer turns a request into tokens, and the engine turns tokens into text.",
    "Most of the time the simplest answer is also the right one, but not always.",
    "If you want to know how fast it is, measure it; if you want to know why, look at what it waits for.",
    "Here is the original image and here are some crops to help you see better",
    "For each function call, return a json object with function name and arguments.",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}',
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    "system\nuser\nassistant\nmodel\nUser: Assistant: USER: ASSISTANT: Picture 1: Picture 2: ",
    "one\ntwo\n\nthree\n\n\nfour\n\n\n\nfive\n\n",
    "def area(width: int, height: int) -> int:\n    return width * height\n\n\n\n",
    "<row_1_col_1><row_1_col_2>\n<row_2_col_1>\n\n<global-img>",
)


def corpus() -> list[str]:
    """The sentences, each as often as makes its words worth an entry."""
    return list(_SENTENCES) * 8
