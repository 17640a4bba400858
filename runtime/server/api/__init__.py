"""The form of requests, responses and errors: OpenAI's API with a few extensions.

::

    body       strict JSON
    schemas    the fields that are read
    fields     the fields that are accepted or refused without being read
    responses  answers, whole and in chunks
    errors     errors, by their reason
"""
