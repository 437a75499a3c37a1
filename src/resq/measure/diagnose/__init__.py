"""Why a quantized model is as good as it is: numbers about activations, bases and where the error comes from."""
