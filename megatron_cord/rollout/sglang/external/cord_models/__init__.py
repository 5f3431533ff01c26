"""Models for SGLang's processes (``SGLANG_EXTERNAL_MODEL_PACKAGE``), where its own compute something else. This must not import the project."""
