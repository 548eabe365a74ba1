//! JSON Schema, OpenAPI and AsyncAPI, generated from the types.
