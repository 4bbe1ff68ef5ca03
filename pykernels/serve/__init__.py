"""Networks behind the protocols that clients speak: Open Inference Protocol v2 over HTTP and gRPC, TensorFlow Serving's
REST form, SageMaker's, Prometheus. docs/serve.md tells how it is used.

What the protocols share stands in files that import neither Starlette nor gRPC nor Ray: signature.py, what a network
takes; costs.py and batching.py, which requests run together; model.py and repository.py, which networks there are;
service.py, all of that with its bounds.
"""
