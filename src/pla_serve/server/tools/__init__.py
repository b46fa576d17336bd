"""Tool calls: how each family of models writes them, read as they are generated.

A *format* (`ToolFormat`) belongs to a family of models: Hermes, Llama 3, Mistral and so on. From
the chat template `choose_format` knows which one a model uses. A format gives

- a *reader*, which takes the text of an answer piece by piece and says what is content and what is
  a call. A whole answer is the same reader fed once, so whole and streamed answers agree; and
- a *grammar*, which holds the model to the format: from the first token where a call is required,
  from the marker that opens a call where it is not.

    reader = choose_format(template).reader(tools)
    for piece in pieces:
        for event in reader.push(piece):
            ...
    for event in reader.finish():
        ...
"""
