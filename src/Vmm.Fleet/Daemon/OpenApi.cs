// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.Fleet.Daemon;

/// <summary>The description of the HTTP interface (OpenAPI 3.1), served at /openapi.json.</summary>
internal static class OpenApi
{
    internal const string Document = """
        {
          "openapi": "3.1.0",
          "info": {"title": "vmctl daemon", "version": "1", "license": {"name": "BSD-2-Clause", "identifier": "BSD-2-Clause"},
            "description": "Local interface of the daemon on a Unix socket; who may open the socket may do everything."},
          "servers": [{"url": "http://localhost"}],
          "paths": {
            "/openapi.json": {"get": {"operationId": "openapi", "responses": {"200": {"description": "This document."}}}},
            "/metrics": {"get": {"operationId": "metrics", "responses": {"200": {"description": "Prometheus text format 0.0.4.",
              "content": {"text/plain": {"schema": {"type": "string"}}}}}}},
            "/v1/version": {"get": {"operationId": "version", "responses": {"200": {"description": "Version and paths of the daemon."}}}},
            "/v1/vms": {"get": {"operationId": "listVms", "responses": {"200": {"description": "All VMs in start order.",
              "content": {"application/json": {"schema": {"type": "object", "required": ["vms", "errors"], "properties": {
                "vms": {"type": "array", "items": {"$ref": "#/components/schemas/Vm"}},
                "errors": {"type": "array", "items": {"type": "string"}, "description": "What is wrong with the definitions."}}}}}}}}},
            "/v1/vms/{name}": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "get": {"operationId": "showVm", "responses": {"200": {"$ref": "#/components/responses/Vm"}, "404": {"$ref": "#/components/responses/Error"}}}},
            "/v1/vms/{name}/start": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "post": {"operationId": "startVm", "description": "Wants the VM up, with everything that it requires. Answers at once.",
                "responses": {"200": {"$ref": "#/components/responses/Vm"}, "404": {"$ref": "#/components/responses/Error"}}}},
            "/v1/vms/{name}/stop": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "post": {"operationId": "stopVm", "description": "Asks the guest to shut down and waits for it.",
                "parameters": [{"name": "force", "in": "query", "schema": {"type": "boolean"}, "description": "End it at once."},
                  {"name": "timeout", "in": "query", "schema": {"type": "string"}, "description": "How long to wait, such as 30s."}],
                "responses": {"200": {"$ref": "#/components/responses/Vm"}, "404": {"$ref": "#/components/responses/Error"},
                  "409": {"$ref": "#/components/responses/Error"}}}},
            "/v1/vms/{name}/pause": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "post": {"operationId": "pauseVm", "responses": {"200": {"$ref": "#/components/responses/Vm"},
                "404": {"$ref": "#/components/responses/Error"}, "409": {"$ref": "#/components/responses/Error"}}}},
            "/v1/vms/{name}/unpause": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "post": {"operationId": "unpauseVm", "responses": {"200": {"$ref": "#/components/responses/Vm"},
                "404": {"$ref": "#/components/responses/Error"}, "409": {"$ref": "#/components/responses/Error"}}}},
            "/v1/vms/{name}/reset": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "post": {"operationId": "resetVm", "responses": {"200": {"$ref": "#/components/responses/Vm"},
                "404": {"$ref": "#/components/responses/Error"}, "409": {"$ref": "#/components/responses/Error"}}}},
            "/v1/vms/{name}/nmi": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "post": {"operationId": "nmiVm", "description": "Presses the NMI button.",
                "responses": {"200": {"$ref": "#/components/responses/Vm"},
                "404": {"$ref": "#/components/responses/Error"}, "409": {"$ref": "#/components/responses/Error"}}}},
            "/v1/vms/{name}/screen": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "get": {"operationId": "screenOfVm", "description": "What the screen shows now.",
                "parameters": [{"name": "width", "in": "query", "schema": {"type": "integer"}, "description": "Shrink to about this width."}],
                "responses": {"200": {"description": "A picture.", "content": {"image/png": {}}},
                "404": {"$ref": "#/components/responses/Error"}, "409": {"$ref": "#/components/responses/Error"}}}},
            "/v1/vms/{name}/console": {"parameters": [{"$ref": "#/components/parameters/name"}],
              "get": {"operationId": "consoleOfVm", "description": "What the guest wrote to its console last.",
                "parameters": [{"name": "tail", "in": "query", "schema": {"type": "integer"}, "description": "At most this many bytes."}],
                "responses": {"200": {"description": "Bytes as the guest sent them.", "content": {"application/octet-stream": {}}},
                "404": {"$ref": "#/components/responses/Error"}, "409": {"$ref": "#/components/responses/Error"}}}},
            "/v1/reload": {"post": {"operationId": "reload", "description": "Reads the definitions now.",
              "responses": {"200": {"description": "Number of VMs."}, "422": {"$ref": "#/components/responses/Error"}}}},
            "/v1/stop": {"post": {"operationId": "stopAll", "description": "Asks all guests to shut down, dependents first, and waits for them.",
              "parameters": [{"name": "force", "in": "query", "schema": {"type": "boolean"}, "description": "End them at once."},
                {"name": "timeout", "in": "query", "schema": {"type": "string"}, "description": "How long to wait for all of them, such as 3m."}],
              "responses": {"200": {"description": "Number of VMs."}, "409": {"$ref": "#/components/responses/Error"}}}},
            "/v1/events": {"get": {"operationId": "events", "responses": {"200": {"description": "Server-sent events, one JSON object each.",
              "content": {"text/event-stream": {"schema": {"type": "string"}}}}}}}
          },
          "components": {
            "parameters": {"name": {"name": "name", "in": "path", "required": true, "schema": {"type": "string"}}},
            "responses": {
              "Vm": {"description": "The VM.", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Vm"}}}},
              "Error": {"description": "What is wrong, in one line.", "content": {"application/json": {"schema": {
                "type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}}}}},
            "schemas": {"Vm": {"type": "object", "required": ["name", "state", "health", "wanted", "pid"], "properties": {
              "name": {"type": "string"},
              "state": {"enum": ["down", "waiting", "starting", "running", "paused", "stopping", "backoff", "failed"]},
              "health": {"enum": ["unknown", "starting", "healthy", "unhealthy"]},
              "wanted": {"type": "boolean"}, "autostart": {"type": "boolean"}, "changed": {"type": "boolean"}, "pid": {"type": "integer"},
              "since": {"type": "string", "format": "date-time"}, "restarts": {"type": "integer"}, "cpus": {"type": "integer"},
              "memory": {"type": "integer", "description": "bytes"}, "description": {"type": "string"}, "note": {"type": "string"},
              "last-exit": {"type": "string"}, "last-status": {"type": "integer"}, "last-message": {"type": "string"},
              "driver": {"type": "string"}, "uptime": {"type": "number"}, "cpu-time": {"type": "number"},
              "resident": {"type": "integer"}, "vnc": {"type": "string"}, "display": {"type": "boolean"}, "definition": {"type": "string"}}}}
          }
        }
        """;
}
